"""Compare every CUDA op of a library with its formula in fp64, on sizes that are not multiples of the tiles.

Usage: ``python ragged.py LIBRARY [FAMILIES [DEVICE]]``. LIBRARY is a library with the ops, for instance one that
build.py in this folder has built for the emulator, or "installed" for the library of the installed package. FAMILIES
are keys of ``FAMILIES``, separated by commas, and select cases; the default is all cases. DEVICE is the torch device of
the tensors: "cpu" (the default) for the emulator, or "cuda" for a GPU. The exit code is 1 if a result is wrong.

A producer is the operation whose output the layer reads, a GELU or a norm. h = x D and dh = gy G^T are the products of
activations and gradients with a factor. The formulas round where the kernels round: the factors, h, dh and the output
of the producer are rounded to the dtype of the activations. The remaining differences are the order of additions and
the last rounding, and the tolerance is therefore small. Some cases also check the update h G without the base product
x W^T.
"""

import ctypes
import itertools
import os
import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import efft_kernels.ops  # noqa: F401  # declares the ops
from efft_kernels.native import MISSING
from efft_kernels.testing import poisoned_empty, with_layout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Values of (tokens, d_in, d_out, rank): zero tokens and one token, ranks and widths that are not multiples of 8,
#: several tiles in each dimension, and 300 tokens, which are summed in two ranges.
SIZES = (
    *((0, 24, 40, 5), (1, 16, 8, 1), (37, 40, 72, 17), (130, 136, 33, 33)),
    *((131, 70, 130, 100), (9, 13, 21, 129), (300, 24, 40, 5)),
)
#: Values of (tokens, d_in, d_out, rank) for tile_cases. The kernel for compute capability 9.0 chooses tiles of
#: 192 x 192 for the first line and of 128 x 256 for the second. Each line has cases in which the kernel computes h,
#: with few and with many columns of y or h, and cases in which it reads h. The third line adds cases for the tiles of
#: 128 x 192 and 128 x 128, between which the third generation of kernels chooses. In the fourth line, the second
#: generation computes h and chooses tiles of 128 x 256. In the last line, the rank is greater than the width of dx.
TILES = (
    *((520, 264, 520, 5), (300, 72, 192, 24), (380, 264, 192, 40), (520, 264, 520, 24)),
    *((500, 520, 256, 5), (200, 136, 256, 24), (256, 200, 256, 33), (500, 520, 256, 24)),
    *((260, 192, 72, 40), (260, 256, 200, 9)),
    *((256, 520, 512, 5), (256, 520, 512, 24)),
    (260, 24, 40, 72),
)
#: Values of (tokens, d_in, d_hidden, rank) for mlp_tile_cases. The third generation of kernels computes the GELU in the
#: product of width d_hidden. The product computes h in the first two lines, with many and with few columns, and reads h
#: in the third line. In each line, the first case has tiles of 128 x 192 and the second one tiles of 128 x 128.
MLP_TILES = (
    *((300, 200, 376, 24), (300, 200, 248, 24)),
    *((300, 200, 376, 5), (390, 200, 248, 5)),
    *((520, 200, 184, 40), (300, 200, 120, 40)),
)
#: Name of the case, results of the ops, exact results, dtype of the activations, and norms of terms. If a result is a
#: sum whose terms may cancel, the last dictionary contains the norm of these terms.
Case = tuple[str, dict[str, Tensor], dict[str, Tensor], torch.dtype, dict[str, float]]


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, dtype=torch.float64)).to(dtype)


def rounded(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype).double()


def linear_cases(producer: str) -> Iterator[Case]:
    """Run the forward and backward passes of tt_linear or, behind a producer, of tt_gelu_linear or tt_norm_linear."""
    op = {"": "tt_linear", "norm": "tt_norm_linear"}.get(producer, "tt_gelu_linear")
    ops = getattr(torch.ops.efft, f"{op}_fwd").cuda, getattr(torch.ops.efft, f"{op}_bwd").cuda
    for (tokens, d_in, d_out, rank), dtype, layout in itertools.product(SIZES, DTYPES, ("contiguous", "odd", "mixed")):
        # The input of a producer may have another dtype than the product, even another 16-bit dtype.
        other = {"odd": torch.float32, "mixed": torch.float16 if dtype == torch.bfloat16 else torch.bfloat16}
        x = random(tokens, d_in, dtype=other.get(layout, dtype) if producer else dtype)
        W, b = random(d_out, d_in, dtype=dtype, scale=d_in**-0.5), random(d_out, dtype=dtype)
        factors = dtype if layout == "mixed" else torch.float32
        D, G = random(d_in, rank, dtype=factors, scale=d_in**-0.5), random(rank, d_out, dtype=factors)
        gy = random(tokens, d_out, dtype=dtype)
        if layout == "odd":  # rows that are not aligned to 16 bytes, and matrices that are stored by columns
            x, gy = with_layout(x, "sliced"), with_layout(gy, "transposed")
            W, D = W.t().contiguous().t(), D.t().contiguous().t()
        gamma, beta = 1 + random(d_in, dtype=dtype, scale=0.3), random(d_in, dtype=dtype)
        own = [gamma, beta, 1e-5] if producer == "norm" else []
        last = [producer] if op == "tt_gelu_linear" else []
        y, h, *statistics = ops[0](x, *own, W, b, D, G, *last)
        grads = ops[1](gy, x, *own, *statistics, W, h, D, G, *last, *[True] * (6 if own else 4))

        at = x.double().requires_grad_()
        if producer == "norm":
            out = F.layer_norm(at, (d_in,), gamma.double(), beta.double())
        else:
            out = F.gelu(at, approximate=producer) if producer else at * 1
        a = rounded(out, dtype)
        D_, G_ = rounded(D, dtype), rounded(G, dtype)
        h_, dh = rounded(a @ D_, dtype), rounded(gy.double() @ G_.t(), dtype)
        base = a @ W.double().t() + b.double()
        dn = gy.double() @ W.double() + dh @ D_.t()
        if producer:
            dn = rounded(dn, dtype)
        (dx,) = torch.autograd.grad(out, at, dn)
        exact = {"y": base + h_ @ G_, "h": h_, "dx": dx, "dD": a.t() @ dh, "dG": h_.t() @ gy.double()}
        exact["db"] = gy.double().sum(0)
        if own:
            exact |= {"dgamma": (dn * F.layer_norm(x.double(), (d_in,))).sum(0), "dbeta": dn.sum(0)}
        got = dict(zip(exact, (y, h, *grads), strict=True))
        if dtype == torch.float32:  # in 16 bits, the rounding error of y is too large
            exact["update"], got["update"] = h_ @ G_, y.double() - base
        h_terms = a.abs() @ D_.abs()
        terms = {"h": h_terms.norm().item(), "dG": (h_terms.t() @ gy.double().abs()).norm().item()}
        terms |= {"db": gy.double().norm().item(), "dgamma": dn.norm().item(), "dbeta": dn.norm().item()}
        yield f"{op} {producer} {tokens} {d_in} {d_out} {rank} {dtype} {layout}", got, exact, dtype, terms


def tile_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Use several tiles in each dimension, and every instance of the kernel for compute capability 9.0."""
    for tokens, d_in, d_out, rank in TILES:
        x, gy = random(tokens, d_in, dtype=dtype), random(tokens, d_out, dtype=dtype)
        W, b = random(d_out, d_in, dtype=dtype, scale=d_in**-0.5), random(d_out, dtype=dtype)
        D, G = random(d_in, rank, dtype=dtype, scale=d_in**-0.5), random(rank, d_out, dtype=dtype)
        y, h = torch.ops.efft.tt_linear_fwd.cuda(x, W, b, D, G)
        dx, *_ = torch.ops.efft.tt_linear_bwd.cuda(gy, None, W, None, D, G, True, False, False, False)
        h_, dh = rounded(x.double() @ D.double(), dtype), rounded(gy.double() @ G.double().t(), dtype)
        exact = {"y": x.double() @ W.double().t() + b.double() + h_ @ G.double(), "h": h_}
        exact["dx"] = gy.double() @ W.double() + dh @ D.double().t()
        yield f"tiles {tokens} {d_in} {d_out} {rank} {dtype}", {"y": y, "h": h, "dx": dx}, exact, dtype, {}
    # An infinite activation must make its row infinite. The unused columns of h beyond the rank must not make it NaN.
    # Newer generations compute h in the kernel of y only if d_in is greater than 192.
    x, W, D, G = (random(*shape, dtype=dtype).abs() for shape in ((9, 40), (72, 40), (40, 5), (5, 72)))
    x[3, 7] = torch.inf
    infinite = torch.zeros(9, 1, dtype=torch.float64)
    infinite[3] = 1
    exact = {"y": infinite.expand(9, 72), "h": infinite.expand(9, 5)}
    for times in (1, 5):
        wide = (x.repeat(1, times), W.repeat(1, times), None, D.repeat(times, 1), G)
        y, h = torch.ops.efft.tt_linear_fwd.cuda(*wide)
        got = {"y": y.isinf().to(dtype), "h": h.isinf().to(dtype)}
        yield f"infinite {40 * times} {dtype}", got, exact, dtype, {}


def mlp_case(
    name: str, sizes: tuple[int, int, int, int], dtype: torch.dtype, norm: bool, approximate: str, transposed: bool
) -> Case:
    """Run the forward and backward passes of tt_mlp.

    Args:
        name: name of the case.
        sizes: tokens, d_in (also the width of the output), d_hidden and the rank of the second layer.
        dtype: dtype of the activations and weights.
        norm: whether the MLP begins with a norm.
        approximate: the kind of GELU.
        transposed: whether the weights are stored by columns. In this case, dD2 is not needed, so that the kernels need
            not compute the output of the GELU in the backward pass.
    """
    tokens, d_in, d_hidden, rank = sizes
    x, gy = random(tokens, d_in, dtype=dtype), random(tokens, d_in, dtype=dtype)
    W1, b1 = random(d_hidden, d_in, dtype=dtype, scale=d_in**-0.5), random(d_hidden, dtype=dtype)
    W2, b2 = random(d_in, d_hidden, dtype=dtype, scale=d_hidden**-0.5), random(d_in, dtype=dtype)
    if transposed:
        W1, W2 = (W.t().contiguous().t() for W in (W1, W2))
    D1, G1 = random(d_in, rank, dtype=dtype, scale=d_in**-0.5), random(rank, d_hidden, dtype=dtype)
    D2, G2 = random(d_hidden, 3, dtype=dtype, scale=d_hidden**-0.5), random(3, d_in, dtype=dtype)
    D2, G2 = (D2, G2) if norm else (D2.repeat(1, rank)[:, :rank], G2.repeat(rank, 1)[:rank])
    gamma, beta = 1 + random(d_in, dtype=dtype, scale=0.3), random(d_in, dtype=dtype)
    own = (gamma, beta, 1e-5) if norm else (None, None, None)
    y, z, h1, h2, *statistics = torch.ops.efft.tt_mlp_fwd.cuda(x, *own, W1, b1, D1, G1, W2, b2, D2, G2, approximate)
    names = ("dx", "dD1", "dG1", "db1", "dD2", "dG2", "db2", "dgamma", "dbeta")
    unneeded = ({"dD2"} if transposed else set()) | (set() if norm else {"dgamma", "dbeta"})
    need = [name not in unneeded for name in names]
    grads = torch.ops.efft.tt_mlp_bwd.cuda(
        gy, x, z, *own, *statistics, W1, W2, h1, h2, D1, G1, D2, G2, approximate, *need
    )
    got = {"y": y, "z": z, "h1": h1, "h2": h2}
    got |= {name: grad for name, grad, needed in zip(names, grads, need, strict=True) if needed}

    at, w = x.double().requires_grad_(), [t.double() for t in (W1, D1, G1, W2, D2, G2)]
    n = F.layer_norm(at, (d_in,), gamma.double(), beta.double()) if norm else at * 1
    a1 = rounded(n, dtype)
    h1_ = rounded(a1 @ w[1], dtype)
    exact = {"z": a1 @ w[0].t() + b1.double() + h1_ @ w[2], "h1": h1_}
    z_ = z.double().requires_grad_()  # the op rounds z, and the GELU is that of the rounded z
    out = F.gelu(z_, approximate=approximate)
    a2 = rounded(out, dtype)
    h2_, dh2 = rounded(a2 @ w[4], dtype), rounded(gy.double() @ w[5].t(), dtype)
    exact |= {"y": a2 @ w[3].t() + b2.double() + h2_ @ w[5], "h2": h2_}
    (dz,) = torch.autograd.grad(out, z_, rounded(gy.double() @ w[3] + dh2 @ w[4].t(), dtype))
    dz = rounded(dz, dtype)
    dh1 = rounded(dz @ w[2].t(), dtype)
    dn = dz @ w[0] + dh1 @ w[1].t()
    dn = rounded(dn, dtype) if norm else dn
    exact |= {"dx": torch.autograd.grad(n, at, dn)[0], "dD1": a1.t() @ dh1, "dG1": h1_.t() @ dz, "db1": dz.sum(0)}
    exact |= {"dD2": a2.t() @ dh2, "dG2": h2_.t() @ gy.double(), "db2": gy.double().sum(0)}
    exact |= {"dgamma": (dn * F.layer_norm(x.double(), (d_in,))).sum(0), "dbeta": dn.sum(0)}
    terms = {"db1": dz.norm().item(), "db2": gy.double().norm().item()}
    terms |= {"h1": (a1.abs() @ w[1].abs()).norm().item(), "h2": (a2.abs() @ w[4].abs()).norm().item()}
    terms |= {"dG1": (h1_.abs().t() @ dz.abs()).norm().item(), "dG2": (h2_.abs().t() @ gy.double().abs()).norm().item()}
    terms |= {"dgamma": dn.norm().item(), "dbeta": dn.norm().item()}
    if x.device.type == "cpu":  # in the emulator, the separate kernels for the GELU compute exactly the same numbers
        same, _ = torch.ops.efft.tt_gelu_linear_fwd.cuda(z, W2, b2, D2, G2, approximate)
        found, expected = (
            torch.ops.efft.tt_gelu_linear_bwd.cuda(gy, at, W2, None, D2, G2, approximate, True, False, False, False)[0]
            for at in (z, z.float())
        )
        different = (y != same).double().sum(), (found != expected.to(dtype)).double().sum()
        got |= {"different y": different[0], "different dz": different[1]}
        exact |= {name: torch.zeros((), dtype=torch.float64) for name in ("different y", "different dz")}
    return f"{name} {sizes} {dtype} {norm} {approximate} {transposed}", got, exact, dtype, terms


def mlp_cases() -> Iterator[Case]:
    for i, (sizes, dtype, norm) in enumerate(itertools.product(SIZES, DTYPES, (False, True))):
        yield mlp_case("mlp", sizes, dtype, norm, ("none", "tanh")[i % 3 % 2], transposed=False)


def mlp_tile_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Use several tiles in each dimension, and the GELU in each instance of the product of the third generation."""
    for i, (sizes, transposed) in enumerate(itertools.product(MLP_TILES, (False, True))):
        yield mlp_case("mlp tiles", sizes, dtype, i % 4 < 2, ("none", "tanh")[i // 2 % 2 ^ transposed], transposed)


def sum_cases() -> Iterator[Case]:
    """Sum many tokens in several ranges, for three choices of the gradients that are sums over tokens."""
    sizes = ((2100, 72, 40, 5), (700, 40, 136, 33), (1, 8, 8, 1), (0, 8, 8, 1), (1030, 20, 12, 17))
    needs = ((True,) * 6, (True, False, False, True, True, False), (True, False, True, False, False, True))
    for (tokens, d_in, d_out, rank), dtype, need in itertools.product(sizes, DTYPES, needs):
        x, gy = random(tokens, d_in, dtype=dtype), random(tokens, d_out, dtype=dtype)
        W, D = random(d_out, d_in, dtype=dtype, scale=d_in**-0.5), random(d_in, rank, dtype=dtype, scale=d_in**-0.5)
        G, gamma, beta = random(rank, d_out, dtype=dtype), random(d_in, dtype=dtype), random(d_in, dtype=torch.float32)
        own = (gamma, beta, 1e-5)
        _, h, *statistics = torch.ops.efft.tt_norm_linear_fwd.cuda(x, *own, W, None, D, G)
        names = ("dx", "dD", "dG", "db", "dgamma", "dbeta")
        found = torch.ops.efft.tt_norm_linear_bwd.cuda(gy, x, *own, *statistics, W, h, D, G, *need)
        got = {name: value for name, value, needed in zip(names, found, need, strict=True) if needed and name != "dx"}
        n = F.layer_norm(x.double(), (d_in,))
        a = rounded(n * gamma.double() + beta.double(), dtype)
        h_, dh = rounded(a @ D.double(), dtype), rounded(gy.double() @ G.double().t(), dtype)
        da = rounded(gy.double() @ W.double() + dh @ D.double().t(), dtype)
        exact = {"dD": a.t() @ dh, "dG": h_.t() @ gy.double(), "db": gy.double().sum(0)}
        exact |= {"dgamma": (da * n).sum(0), "dbeta": da.sum(0)}
        terms = {"dG": ((a.abs() @ D.double().abs()).t() @ gy.double().abs()).norm().item()}
        terms |= {"db": gy.double().norm().item(), "dgamma": da.norm().item(), "dbeta": da.norm().item()}
        yield f"sums {tokens} {d_in} {d_out} {rank} {dtype} {need}", got, exact, dtype, terms


def update_cases() -> Iterator[Case]:
    """Check y and dx with inputs for which the base product is zero, so that both consist only of the small update."""
    for dtype, rank in itertools.product(DTYPES, (5, 33)):
        x, gy = (torch.cat([half, half], 1) for half in (random(37, 20, dtype=dtype), random(37, 28, dtype=dtype)))
        gy[:, 28:] *= -1
        block = random(28, 20, dtype=dtype, scale=0.2)
        W = torch.cat([block, -block], 1).repeat(2, 1)
        D, G = random(40, rank, dtype=torch.float32, scale=0.1), random(rank, 56, dtype=torch.float32, scale=1e-3)
        y, h = torch.ops.efft.tt_linear_fwd.cuda(x, W, None, D, G)
        dx, *_ = torch.ops.efft.tt_linear_bwd.cuda(gy, x, W, h, D, G, True, False, False, False)
        D_, G_ = rounded(D, dtype), rounded(G, dtype)
        h_, dh = rounded(x.double() @ D_, dtype), rounded(gy.double() @ G_.t(), dtype)
        exact = {"update y": h_ @ G_, "update dx": dh @ D_.t()}
        yield f"update {rank} {dtype}", {"update y": y, "update dx": dx}, exact, dtype, {}


def grouped_cases() -> Iterator[Case]:
    for (tokens, d_in, d_out, rank), dtype in itertools.product(SIZES, DTYPES):
        x, W = random(4, tokens, d_in, dtype=dtype), random(d_out, d_in, dtype=dtype, scale=d_in**-0.5)
        D, G = random(3, d_in, rank, dtype=torch.float32), random(3, rank, d_out, dtype=torch.float32)
        adapter = torch.tensor([2, -1, 0, 2])
        y = torch.ops.efft.tt_linear_grouped.cuda(x, W, None, D, G, adapter)
        some = (adapter >= 0).double()[:, None, None]
        D_, G_ = rounded(D, dtype)[adapter] * some, rounded(G, dtype)[adapter]
        exact = x.double() @ W.double().t() + rounded(x.double() @ D_, dtype) @ G_
        yield f"tt_linear_grouped {tokens} {d_in} {d_out} {rank} {dtype}", {"y": y}, {"y": exact}, dtype, {}
        _, h = torch.ops.efft.tt_linear_grouped_fwd.cuda(x, W, None, D, G, adapter)
        gy = random(4, tokens, d_out, dtype=dtype)
        dx, *_ = torch.ops.efft.tt_linear_grouped_bwd.cuda(gy, None, W, None, D, G, adapter, True, False, False, False)
        dh = rounded(gy.double() @ (G_ * some).mT, dtype)
        expected = {"h": rounded(x.double() @ D_, dtype), "dx": gy.double() @ W.double() + dh @ D_.mT}
        yield f"grouped gradients {tokens} {d_in} {d_out} {rank} {dtype}", {"h": h, "dx": dx}, expected, dtype, {}


def contract_cases() -> Iterator[Case]:
    sizes = ((3, 2, 5, 7, 40), (1, 1, 1, 1, 1), (2, 3, 33, 17, 70), (2, 1, 100, 65, 129))
    for (n_layers, n_cores, r1, r2, d_out), dtype, masks in itertools.product(sizes, DTYPES, (False, True)):
        C, V = random(n_layers, n_cores, r1, r2, dtype=dtype), random(r2, d_out, dtype=dtype)
        keep_C, keep_V = torch.rand(C.shape) > 0.25, torch.rand(n_layers, r2, d_out) > 0.25
        kept = [keep_C, keep_V] if masks else [None, None]
        dG = random(n_layers, r1, n_cores * d_out, dtype=dtype)
        G = torch.ops.efft.tt_contract_fwd.cuda(C, V, *kept, 0.75)
        dC, dV = torch.ops.efft.tt_contract_bwd.cuda(dG, C, V, *kept, 0.75, True, True)
        C_, V_ = C.double().requires_grad_(), V.double().requires_grad_()
        left, right = (C_ * keep_C, V_ * keep_V) if masks else (C_, V_.expand(n_layers, -1, -1))
        G_ = 0.75 * torch.einsum("lcij,ljn->licn", left, right).flatten(2)
        dC_, dV_ = torch.autograd.grad(G_, (C_, V_), dG.double())
        name = f"tt_contract {n_layers} {n_cores} {r1} {r2} {d_out} {dtype} {masks}"
        yield name, {"G": G, "dC": dC, "dV": dV}, {"G": G_.detach(), "dC": dC_, "dV": dV_}, dtype, {}


def merge_cases() -> Iterator[Case]:
    for (_, d_in, d_out, rank), dtype in itertools.product(SIZES, DTYPES):
        W, D, G = (
            random(d_in, d_out, dtype=dtype).t(),
            random(d_in, rank, dtype=dtype),
            random(rank, d_out, dtype=dtype),
        )
        exact = W.double() - (D.double() @ G.double()).t()
        torch.ops.efft.tt_merge_.cuda(W, D, G, -1.0)
        yield f"tt_merge_ {d_in} {d_out} {rank} {dtype}", {"W": W}, {"W": exact}, dtype, {}


FAMILIES = {
    "linear": lambda: linear_cases(""),
    "gelu": lambda: itertools.chain(linear_cases("none"), linear_cases("tanh")),
    "norm": lambda: linear_cases("norm"),
    "tiles bfloat16": lambda: tile_cases(torch.bfloat16),
    "tiles float16": lambda: tile_cases(torch.float16),
    "mlp": mlp_cases,
    "mlp tiles bfloat16": lambda: mlp_tile_cases(torch.bfloat16),
    "mlp tiles float16": lambda: mlp_tile_cases(torch.float16),
    "sums": sum_cases,
    "update": update_cases,
    "grouped": grouped_cases,
    "contract": contract_cases,
    "merge": merge_cases,
}


def main(library: str, only: str = "", device: str = "cpu") -> int:
    if library == "installed":
        assert MISSING["cuda"] is None, MISSING["cuda"]
    else:
        torch.ops.load_library(library)
    torch.set_default_device(device)
    torch.manual_seed(0)
    count = wrong = 0
    with poisoned_empty():
        chosen = [FAMILIES[family]() for family in (only.split(",") if only else FAMILIES)]
        for name, got, exact, dtype, terms in itertools.chain(*chosen):
            count += 1
            for part, value in got.items():
                error = (value.double() - exact[part]).norm().item()
                size = exact[part].norm().item()
                if value.dtype.itemsize == 2:
                    allowed = torch.finfo(value.dtype).eps * size
                elif dtype == torch.float32:  # the order of additions; "update" also has errors of the base product
                    size = max(size, terms.get(part, 0.0))
                    allowed = 16 * torch.finfo(dtype).eps * (4 * max(size, 1) if "update" in part else size)
                else:  # a sum over values of h or dh, a few of which may be rounded differently
                    allowed = 0.1 * torch.finfo(dtype).eps * size
                if not error <= allowed:
                    wrong += 1
                    print(f"WRONG {name} {part}: error {error:.2e}, allowed {allowed:.2e}, size {size:.2e}")
            if wrong:
                break  # one wrong case is enough
    print(f"{count} cases, {wrong} wrong")
    if device == "cpu":
        run, kernels, clusters = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        ctypes.CDLL(library).efft_emulation_coverage(*map(ctypes.byref, (run, kernels, clusters)))
        print(f"{run.value} of {kernels.value} kernels run, {clusters.value} of them in clusters of blocks")
        if "EFFT_EMULATION_LOG" in os.environ:
            log = ctypes.CDLL(library).efft_emulation_launches
            log.restype = ctypes.c_char_p
            print("kernels:", *sorted({line.split()[0] for line in log().decode().splitlines()}))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
