"""Specify each op as plain differentiable torch code, computed in fp32 (fp64 for fp64 inputs).

The functions ``<op>_bwd`` compute the gradients of the ops, also as differentiable torch code. The other backends call
them in a backward pass that will itself be differentiated.

W and b are the weight and the bias of a linear layer, and the update of the layer is D G, the product of two factors.
gy is the gradient of the output y, and dx, dD, dG and db are the gradients of x, D, G and b.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from efft_kernels._arguments import no_autocast


def tt_linear(
    x: Tensor,  # [..., d_in]
    W: Tensor,  # [d_out, d_in]
    b: Tensor | None,  # [d_out]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
) -> Tensor:  # [..., d_out], dtype of x
    """Compute y = x Wᵀ + b + (x D) G."""
    dtype = _wide(x, D, G)
    with no_autocast(x.device):
        xw = x.to(dtype)
        y = xw @ W.to(dtype).t() + (xw @ D.to(dtype)) @ G.to(dtype)
        if b is not None:
            y = y + b.to(dtype)
        return y.to(x.dtype)


def tt_linear_bwd(
    gy: Tensor,  # [tokens, d_out]
    x: Tensor | None,  # [tokens, d_in]; needed for dD
    W: Tensor | None,  # [d_out, d_in]; needed for dx
    h: Tensor | None,  # [tokens, r1]; needed for dG
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    gh: Tensor | None = None,  # [tokens, r1]: the gradient that reaches h without passing through y
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:  # dx, dD, dG in the dtypes of gy, D, G; db [d_out]
    """Return differentiable gradients. dx is None without W, dD is None without x, and dG is None without h.

    db is in the dtype of the computation.
    """
    dtype = _wide(gy, D, G)
    wide_gy, wide_D = gy.to(dtype), D.to(dtype)
    dh = wide_gy @ G.to(dtype).t()  # [tokens, r1]
    if gh is not None:
        dh = dh + gh
    dx = None if W is None else (wide_gy @ W.to(dtype) + dh @ wide_D.t()).to(gy.dtype)
    dD = None if x is None else (x.to(dtype).t() @ dh).to(D.dtype)
    dG = None if h is None else (h.to(dtype).t() @ wide_gy).to(G.dtype)
    return dx, dD, dG, wide_gy.sum(0)


def tt_gelu_linear(
    z: Tensor,  # [..., d_in]
    W: Tensor,  # [d_out, d_in]
    b: Tensor | None,  # [d_out]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    approximate: str,
) -> Tensor:  # [..., d_out], dtype of W
    """Compute y = gelu(z) Wᵀ + b + (gelu(z) D) G."""
    with no_autocast(z.device):
        return tt_linear(F.gelu(z.to(_wide(z)), approximate=approximate), W, b, D, G).to(W.dtype)


def tt_gelu_linear_bwd(
    gy: Tensor,  # [tokens, d_out]
    z: Tensor,  # [tokens, d_in]
    W: Tensor | None,  # [d_out, d_in]; needed for dz
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    approximate: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:  # dz, dD, dG in the dtypes of z, D, G; db [d_out]
    """Return differentiable gradients. dz is None without W, and db is in the dtype of the computation."""
    wide_z = z.to(_wide(z, D, G))
    a = F.gelu(wide_z, approximate=approximate)
    da, dD, dG, db = tt_linear_bwd(gy.to(a.dtype), a, W, a @ D.to(a.dtype), D, G)
    if da is None:
        return None, dD, dG, db
    return torch.ops.aten.gelu_backward(da, wide_z, approximate=approximate).to(z.dtype), dD, dG, db


def tt_norm_linear(
    x: Tensor,  # [..., d_in]
    gamma: Tensor | None,  # [d_in]
    beta: Tensor | None,  # [d_in]
    W: Tensor,  # [d_out, d_in]
    b: Tensor | None,  # [d_out]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    eps: float,
) -> Tensor:  # [..., d_out], dtype of W
    """Compute y = n Wᵀ + b + (n D) G with n = (x - mean(x)) / sqrt(var(x) + eps) · gamma + beta."""
    with no_autocast(x.device):
        n, _ = _standardized(x.to(_wide(x, gamma, beta)), eps)
        return tt_linear(_scaled(n, gamma, beta), W, b, D, G).to(W.dtype)


def tt_norm_linear_bwd(
    gy: Tensor,  # [tokens, d_out]
    x: Tensor,  # [tokens, d_in]
    gamma: Tensor | None,  # [d_in]
    beta: Tensor | None,  # [d_in]
    W: Tensor | None,  # [d_out, d_in]; needed for dx
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    eps: float,
) -> tuple[Tensor | None, ...]:  # dx, dD, dG in the dtypes of x, D, G; db [d_out], dgamma, dbeta [d_in]
    """Return differentiable gradients. dx, dgamma and dbeta are None without W.

    db, dgamma and dbeta are in the dtype of the computation.
    """
    standardized, deviation = _standardized(x.to(_wide(x, gamma, beta, D, G)), eps)
    n = _scaled(standardized, gamma, beta)
    g, *sums = tt_linear_bwd(gy.to(n.dtype), n, W, n @ D.to(n.dtype), D, G)
    if g is None:
        return None, *sums, None, None
    sums += [(g * standardized).sum(0), g.sum(0)]
    if gamma is not None:
        g = g * gamma
    along = (g * standardized).mean(-1, keepdim=True)
    dx = (g - g.mean(-1, keepdim=True) - standardized * along) / deviation
    return dx.to(x.dtype), *sums


def tt_mlp(
    x: Tensor,  # [..., d_in]
    gamma: Tensor | None,  # [d_in]
    beta: Tensor | None,  # [d_in]
    eps: float | None,
    W1: Tensor,  # [d_hidden, d_in]
    b1: Tensor | None,  # [d_hidden]
    D1: Tensor,  # [d_in, r1]
    G1: Tensor,  # [r1, d_hidden]
    W2: Tensor,  # [d_out, d_hidden]
    b2: Tensor | None,  # [d_out]
    D2: Tensor,  # [d_hidden, r1]
    G2: Tensor,  # [r1, d_out]
    approximate: str,
) -> Tensor:  # [..., d_out], dtype of W2
    """Compute y = gelu(z) W2ᵀ + b2 + (gelu(z) D2) G2 with z = n W1ᵀ + b1 + (n D1) G1.

    n is the layer norm of x, or x if ``eps`` is None.
    """
    with no_autocast(x.device):
        z = _hidden(x, gamma, beta, eps, W1, b1, D1, G1)
        return tt_linear(F.gelu(z, approximate=approximate), W2, b2, D2, G2).to(W2.dtype)


def tt_mlp_bwd(
    gy: Tensor,  # [tokens, d_out]
    x: Tensor,  # [tokens, d_in]
    z: Tensor,  # [tokens, d_hidden]; used only without W1
    gamma: Tensor | None,  # [d_in]
    beta: Tensor | None,  # [d_in]
    eps: float | None,
    W1: Tensor | None,  # [d_hidden, d_in]; None if z does not depend on any tensor that requires a gradient
    b1: Tensor | None,  # [d_hidden]
    W2: Tensor | None,  # [d_out, d_hidden]; needed with W1
    D1: Tensor,  # [d_in, r1]
    G1: Tensor,  # [r1, d_hidden]
    D2: Tensor,  # [d_hidden, r1]
    G2: Tensor,  # [r1, d_out]
    approximate: str,
) -> tuple[Tensor | None, ...]:  # dx, dD1, dG1, db1, dD2, dG2, db2, dgamma, dbeta
    """Return differentiable gradients. Without W1, all gradients except dD2, dG2 and db2 are None.

    db1, db2, dgamma and dbeta are in the dtype of the computation, and the others in the dtypes of x, D1, G1, D2, G2.
    """
    if W1 is None:
        _, *of_second = tt_gelu_linear_bwd(gy, z, None, D2, G2, approximate)
        return None, None, None, None, *of_second, None, None
    z = _hidden(x, gamma, beta, eps, W1, b1, D1, G1)
    dz, *of_second = tt_gelu_linear_bwd(gy, z, W2, D2, G2, approximate)
    assert dz is not None
    of_norm: Sequence[Tensor | None] = (None, None)
    if eps is None:
        wide = x.to(dz.dtype)
        dx, *of_first = tt_linear_bwd(dz, wide, W1, wide @ D1.to(dz.dtype), D1, G1)
    else:
        dx, *of_first, dgamma, dbeta = tt_norm_linear_bwd(dz, x, gamma, beta, W1, D1, G1, eps)
        of_norm = dgamma, dbeta
    assert dx is not None
    return dx.to(x.dtype), *of_first, *of_second, *of_norm


def _hidden(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float | None,
    W1: Tensor,
    b1: Tensor | None,
    D1: Tensor,
    G1: Tensor,
) -> Tensor:
    """Return the input of the GELU of an MLP, in the dtype of the computation."""
    n = x.to(_wide(x, gamma, beta))
    if eps is not None:
        n = _scaled(_standardized(n, eps)[0], gamma, beta)
    return tt_linear(n, W1, b1, D1, G1)


def _standardized(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x with mean 0 and standard deviation 1 along its last dimension, and sqrt(variance of x + eps)."""
    centered = x - x.mean(-1, keepdim=True)
    deviation = (centered.square().mean(-1, keepdim=True) + eps).sqrt()
    return centered / deviation, deviation


def _scaled(n: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    n = n if gamma is None else n * gamma
    return n if beta is None else n + beta


def tt_linear_grouped(
    x: Tensor,  # [samples, tokens, d_in]
    W: Tensor,  # [d_out, d_in]
    b: Tensor | None,  # [d_out], or [n_adapters, d_out]
    D: Tensor,  # [n_adapters, d_in, r1]
    G: Tensor,  # [n_adapters, r1, d_out]
    adapter: Tensor,  # [samples]
) -> Tensor:  # [samples, tokens, d_out], dtype of x
    """Compute y[i] = x[i] Wᵀ + b + (x[i] D[a_i]) G[a_i] for each sample i, where a_i = adapter[i].

    A negative a_i means no adapter, and therefore no update. If every adapter has its own bias, b is replaced by
    b[a_i], and a sample without an adapter has no bias.
    """
    dtype = _wide(x, D, G)
    none, index = adapter < 0, adapter.clamp(min=0)

    def of_samples(rows: Tensor) -> Tensor:  # a product with a mask would be wrong: NaN times zero is NaN
        found = rows[index].to(dtype)
        return found.masked_fill(none.view(-1, *[1] * (rows.dim() - 1)), 0)

    with no_autocast(x.device):
        xw = x.to(dtype)
        y = xw @ W.to(dtype).t() + (xw @ of_samples(D)) @ of_samples(G)
        if b is not None:
            y = y + (b.to(dtype) if b.dim() == 1 else of_samples(b)[:, None])
        return y.to(x.dtype)


def tt_linear_grouped_bwd(
    gy: Tensor,  # [samples, tokens, d_out]
    x: Tensor | None,  # [samples, tokens, d_in]; needed for dD and dG
    W: Tensor | None,  # [d_out, d_in]; needed for dx
    D: Tensor,  # [n_adapters, d_in, r1]
    G: Tensor,  # [n_adapters, r1, d_out]
    adapter: Tensor,  # [samples]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:  # dx, dD, dG as gy, D, G; db [n_adapters, d_out]
    """Return differentiable gradients. dx is None without W, and dD and dG are None without x.

    db, in the dtype of the computation, is the gradient of the adapters' own biases. If the number of a sample's
    adapter is too large, dx of that sample is NaN.
    """
    dtype, n = _wide(gy, D, G), len(D)
    index = adapter.clamp(0, n - 1)
    # Samples without an existing adapter are added to a row that is then cut off.
    row = torch.where((adapter < 0) | (adapter >= n), n, adapter)

    def of_samples(
        factors: Tensor,
    ) -> Tensor:  # a product with a mask would be wrong: NaN times zero is NaN
        rows = factors[index].to(dtype)
        rows = rows.masked_fill((adapter < 0)[:, None, None], 0)
        return rows.masked_fill((adapter >= n)[:, None, None], torch.nan)

    def of_adapters(rows: Tensor) -> Tensor:
        return rows.new_zeros(n + 1, *rows.shape[1:]).index_add(0, row, rows)[:n]

    down, up, wide_gy = of_samples(D), of_samples(G), gy.to(dtype)
    dh = wide_gy @ up.mT  # [samples, tokens, r1]; like h, zero for a sample without an adapter
    dx = None if W is None else (wide_gy @ W.to(dtype) + dh @ down.mT).to(gy.dtype)
    db = of_adapters(wide_gy.sum(1))
    if x is None:
        return dx, None, None, db
    dD = of_adapters(x.to(dtype).mT @ dh).to(D.dtype)
    dG = of_adapters((x.to(dtype) @ down).mT @ wide_gy).to(G.dtype)
    return dx, dD, dG, db


def tt_contract(
    C: Tensor,  # [n_layers, n_cores, r1, r2]
    V: Tensor,  # [r2, d_out]
    keep_C: Tensor | None = None,  # [n_layers, n_cores, r1, r2], bool
    keep_V: Tensor | None = None,  # [n_layers, r2, d_out], bool
    scale: float = 1.0,
) -> Tensor:  # [n_layers, r1, n_cores * d_out], dtype of C
    """Compute G[l] = scale · [C[l, 0] V | C[l, 1] V | ...] for each layer l.

    Elements of C and V for which the dropout masks ``keep_C`` and ``keep_V`` are False count as zero.
    """
    dtype = _wide(C, V)
    with no_autocast(C.device):
        cores, right = _kept(C.to(dtype), V.to(dtype), keep_C, keep_V)
        G = scale * torch.einsum("lnab,lbd->land", cores, right)
        return G.flatten(2).to(C.dtype)


def tt_contract_bwd(
    dG: Tensor,  # [n_layers, r1, n_cores * d_out]
    C: Tensor,  # [n_layers, n_cores, r1, r2]
    V: Tensor,  # [r2, d_out]
    keep_C: Tensor | None,  # [n_layers, n_cores, r1, r2], bool
    keep_V: Tensor | None,  # [n_layers, r2, d_out], bool
    scale: float,
) -> tuple[Tensor, Tensor]:  # dC, dV in the dtypes of C, V
    """Return differentiable gradients."""
    dtype = _wide(C, V)
    cores, right = _kept(C.to(dtype), V.to(dtype), keep_C, keep_V)
    blocks = scale * dG.to(dtype).unflatten(2, (C.shape[1], V.shape[1]))  # [n_layers, r1, n_cores, d_out]
    dC = torch.einsum("land,lbd->lnab", blocks, right)
    dV = torch.einsum("lnab,land->lbd", cores, blocks)
    dC, dV = _masked(dC, keep_C), _masked(dV, keep_V).sum(0)
    return dC.to(C.dtype), dV.to(V.dtype)


def _kept(C: Tensor, V: Tensor, keep_C: Tensor | None, keep_V: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return C, and V for every layer, with dropped elements set to zero."""
    return _masked(C, keep_C), _masked(V.expand(C.shape[0], *V.shape), keep_V)


def _masked(tensor: Tensor, keep: Tensor | None) -> Tensor:
    return tensor if keep is None else tensor * keep


@torch.no_grad()
def tt_merge_(
    W: Tensor,  # [d_out, d_in], changed in place
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    sign: float = 1.0,
) -> Tensor:  # W
    """Compute W ← W + sign · (D G)ᵀ, rounded once to W's dtype."""
    dtype = _wide(W, D, G)
    with no_autocast(W.device):
        return W.copy_(W.to(dtype) + sign * (D.to(dtype) @ G.to(dtype)).t())


def _wide(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype of the computation: float64 if any tensor is float64, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
