"""Test the Triton kernels of the products and of the sums over tokens, with every size of tiles.

Most shapes are not multiples of the tiles. On a GPU the kernels are compiled. In Triton's interpreter, the address
checker checks the accesses. Most tests fill uninitialized buffers with NaN.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from efft_kernels.testing import assert_close_budget, chained_matmul, poisoned_empty, with_layout
from efft_kernels.triton import launch
from efft_kernels.triton.launch import FP32_TILES, HALF_TILES, TF32_TILES, TMA_TILES, GemmTile
from efft_kernels.triton.lowrank_gemm import gelu_project, lowrank_gemm, norm_project, project
from efft_kernels.triton.reduce_tokens import Layer, Sums, reduce_tokens

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.efft_kernels.triton.address_checker import checked

    GPU = launch.Device(132, 2**31, 9)
else:
    pytestmark = pytest.mark.gpu
    GPU = launch.device(torch.device("cuda"))

    @contextmanager
    def checked() -> Iterator[list[str]]:
        """Yield the names of the kernels launched inside the ``with`` block, like the interpreter's version."""
        names: list[str] = []

        def note(metadata: triton.compiler.LazyDict) -> None:
            names.append(metadata.get()["name"])

        triton.knobs.runtime.launch_enter_hook.add(note)
        try:
            yield names
        finally:
            triton.knobs.runtime.launch_enter_hook.remove(note)


DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: A GPU so small that each program processes several tiles.
FEW = launch.Device(2, GPU.shared_memory, GPU.capability)
SHAPES = [(70, 90, 100), (1, 16, 300), (129, 257, 33), (64, 128, 64), (5, 1, 1)]


def matrix(rows: int, columns: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)  # the same numbers on every device
    values = scale * torch.randn(rows, columns, generator=generator, dtype=torch.float64, device="cpu")
    return values.to(torch.get_default_device(), dtype)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right``. The tests compare the errors of the kernels with the errors of this product.

    For fp32 on a GPU it adds the terms in one chain, like these kernels. The vendor's product adds in several chains.
    """
    return chained_matmul(left, right) if left.is_cuda and left.dtype == torch.float32 else left @ right


def summed(left: Tensor, right: Tensor) -> Tensor:
    """Return leftᵀ right in fp32. On a GPU it adds in one chain, because tensor cores are less accurate than fp32."""
    return chained_matmul(left.t(), right) if left.is_cuda else left.float().t() @ right.float()


def sums_of(*operands: Tensor | None, splits: int | None = None, **settings: Any) -> Sums:
    """Return the sums over tokens of one layer."""
    (sums,) = reduce_tokens(Layer(*operands, **settings), splits=splits)
    return sums


def needs(tile: GemmTile, dtype: torch.dtype, *, tma: bool = False) -> None:
    """Skip the test if the launch code would never choose the tile on this GPU."""
    if GPU.capability < tile.capability:
        pytest.skip(f"needs a GPU with a compute capability above {GPU.capability}.x")
    if tile.shared_memory(dtype.itemsize, tma=tma) > GPU.shared_memory:
        pytest.skip(f"needs more shared memory than {GPU.shared_memory} bytes")


def operands(M: int, N: int, K: int, R: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return A, the transpose of B (which is a weight), bias, and the factors P and T in fp32."""
    return (
        matrix(M, K, dtype, 0),
        matrix(N, K, dtype, 1, K**-0.5),
        matrix(1, N, dtype, 2)[0],
        matrix(K, R, torch.float32, 3, K**-0.5),
        matrix(R, N, torch.float32, 4, R**-0.5),
    )


def unfused(A: Tensor, B: Tensor, bias: Tensor, P: Tensor, T: Tensor) -> tuple[Tensor, Tensor]:
    """Compute (Y, H) by the plain formula in the precision of the operands."""
    H = product(A, P.to(A.dtype))
    return product(A, B) + product(H, T.to(A.dtype)) + bias, H


@pytest.mark.parametrize(
    ("dtype", "tile"),
    [
        *((torch.float32, tile) for tile in (*FP32_TILES, *TF32_TILES)),
        *((dtype, tile) for tile in HALF_TILES for dtype in DTYPES[1:]),
    ],
    ids=lambda value: f"{value.m}x{value.n}x{value.k}" if isinstance(value, GemmTile) else str(value),
)
def test_gemm(dtype: torch.dtype, tile: GemmTile) -> None:
    needs(tile, dtype)
    for i, (M, N, K) in enumerate(SHAPES):
        R = (5, 65, 128, 1, 33)[i]
        A, weight, bias, P, T = operands(M, N, K, R, dtype)
        with checked() as names, poisoned_empty():
            Y, H = lowrank_gemm(A, weight.t(), bias, P, T, tile=tile, tma=False)
        assert names == ["project_kernel", "lowrank_gemm_kernel"]
        exact = unfused(A.double(), weight.double().t(), bias.double(), P.double(), T.double())
        for got, formula, peer in zip((Y, H), exact, unfused(A, weight.t(), bias, P, T), strict=True):
            assert_close_budget(got, formula, peer, name=f"{(M, N, K, R)}")


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "tma"])
@pytest.mark.parametrize("R", [16, 24, 33, 40, 48, 65, 70, 96])
def test_tails_of_the_second_generation(monkeypatch: pytest.MonkeyPatch, R: int, tma: bool) -> None:
    """The second generation of the kernels computes the tail, the product H T, in steps over R.

    All steps together have R columns, rounded up to a multiple of 16. The results are correct.
    """
    monkeypatch.setattr(launch, "KERNELS", 2)
    assert triton.cdiv(R, launch.tail_block(R)) * launch.tail_block(R) == triton.cdiv(R, 16) * 16
    if tma and GPU.capability < 9:
        pytest.skip(f"needs a GPU with a compute capability above {GPU.capability}.x")
    A, weight, bias, P, T = operands(70, 96, 104, R, torch.float16)
    with checked(), poisoned_empty():
        got = lowrank_gemm(A, weight.t(), bias, P, T, tma=tma)
    exact = unfused(*(t.double() for t in (A, weight.t(), bias)), P.half().double(), T.half().double())
    plain = unfused(A, weight.t(), bias, P, T)
    for name, value, of_formula, rounded in zip("YH", got, exact, plain, strict=True):
        assert_close_budget(value, of_formula, rounded, name=name)


@pytest.mark.parametrize("direction", ["forward", "backward", "behind a gelu"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("tile", TMA_TILES, ids=lambda tile: f"{tile.m}x{tile.n}x{tile.k}")
def test_gemm_by_tma(dtype: torch.dtype, tile: GemmTile, direction: str) -> None:
    """Most sizes are not multiples of the tiles, but the rows that TMA reads have a multiple of 16 bytes.

    ``FEW`` has so few multiprocessors that each program processes several tiles.
    """
    needs(tile, dtype, tma=True)
    for M, N, K, R in [(70, 88, 104, 5), (1, 16, 296, 65), (129, 264, 40, 128), (64, 128, 64, 1)]:
        A, weight, bias, P, T = operands(M, N, K, R, dtype)
        B, bias = (weight.t(), bias) if direction == "forward" else (weight.t().contiguous(), None)
        Z = matrix(M, N, dtype, 8) if direction == "behind a gelu" else None
        with (
            checked() as names,
            poisoned_empty(),
            mock.patch("efft_kernels.triton.lowrank_gemm.device", return_value=FEW),
        ):
            Y, H = lowrank_gemm(A, B, bias, P, T, Z=Z, producer="gelu", tile=tile)
        assert names == ["project_kernel", "lowrank_gemm_tma_kernel"]
        results = []
        for to in (torch.float64, dtype):
            none = torch.zeros(N, dtype=to)
            y, h = unfused(*(none if t is None else t.to(to) for t in (A, B, bias, P, T)))
            if Z is not None:
                z = Z.to(to).requires_grad_()
                y = torch.autograd.grad(F.gelu(z), z, y)[0]
            results.append((y, h))
        for got, formula, peer in zip((Y, H), *results, strict=True):
            assert_close_budget(got, formula, peer, name=f"{(M, N, K, R)}")


@pytest.mark.skipif(GPU.capability < 9, reason="TMA needs a GPU of compute capability 9.0 or newer")
def test_what_tma_cannot_move() -> None:
    A, weight, _, P, T = operands(33, 40, 48, 5, torch.bfloat16)
    odd = matrix(33, 49, torch.bfloat16, 0)[:, 1:]  # rows of 98 bytes
    cases = {"plain": (A, weight), "odd": (odd, weight), "transposed": (with_layout(A, "transposed"), weight)}
    cases["fp32"] = (A.float(), weight.float())
    for name, (a, w) in cases.items():
        with checked() as names:
            Y, _ = lowrank_gemm(a, w.t(), None, P, T)
        kernel = "lowrank_gemm_tma_kernel" if name == "plain" else "lowrank_gemm_kernel"
        assert names == ["project_kernel", kernel], name
        exact = unfused(*(t.double() for t in (a, w.t(), torch.zeros(40), P, T)))[0]
        assert_close_budget(Y, exact, unfused(a, w.t(), torch.zeros(40, dtype=a.dtype), P, T)[0], name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_update_alone(dtype: torch.dtype) -> None:
    """B is zero and there is no bias, so the result consists of the update only."""
    A, weight, bias, P, T = operands(70, 90, 100, 24, dtype)
    zero, none = torch.zeros_like(weight), torch.zeros_like(bias)
    Y, _ = lowrank_gemm(A, zero.t(), None, P, T)
    exact, peer = (A.double() @ P.double()) @ T.double(), unfused(A, zero.t(), none, P, T)[0]
    assert_close_budget(Y, exact, peer)


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_strides(layout: str) -> None:
    A, weight, bias, P, T = (with_layout(t, layout) for t in operands(70, 90, 100, 24, torch.float32))
    expected = unfused(A, weight.t(), bias, P, T)
    with checked():
        got = lowrank_gemm(A, weight.t(), bias, P, T)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("splits", [1, 2, 3, 7, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_over_tokens(dtype: torch.dtype, splits: int | None) -> None:
    for M, d_out, d_in, R in [(300, 130, 70, 9), (64, 16, 257, 65), (1, 1, 1, 1), (0, 40, 24, 5), (700, 33, 32, 128)]:
        gy, x = matrix(M, d_out, dtype, 0), matrix(M, d_in, dtype, 1)
        h, dh = matrix(M, R, dtype, 2), matrix(M, R, dtype, 3)
        with checked() as names, poisoned_empty():
            dG, dD, db = sums_of(gy, h, x, dh, splits=splits, need_db=True)
        assert names == ["reduce_tokens_kernel", "finish_kernel"], "all sums in the same launches"
        ones = torch.ones(M, 1, dtype=dtype)
        for got, left, right in ((dG, h, gy), (dD, x, dh), (db[None], ones, gy)):
            assert got.dtype == torch.float32
            exact = left.double().t() @ right.double()
            assert_close_budget(got, exact, summed(left, right), factor=4, name=f"{(M, R, splits)}")
        again = sums_of(gy, h, x, dh, splits=splits)
        assert torch.equal(again[0], dG)
        assert torch.equal(again[1], dD)
        assert again[2].shape == (0,)
        assert torch.equal(sums_of(None, None, x, dh, splits=splits)[1], dD)
        assert torch.equal(sums_of(gy, h, None, None, splits=splits)[0], dG)


def test_sums_over_tokens_of_rank_0() -> None:
    gy, nothing = matrix(70, 33, torch.float32, 0), torch.empty(70, 0)
    with poisoned_empty():
        dG, dD, db = sums_of(gy, nothing, gy, nothing, need_db=True)
    assert (dG.shape, dD.shape) == ((0, 33), (33, 0))
    assert_close_budget(db, gy.double().sum(0), gy.sum(0), name="db")


def test_sums_over_tokens_of_any_strides() -> None:
    tensors = [matrix(70, n, torch.float32, seed) for seed, n in enumerate((33, 9, 20, 9))]
    expected = sums_of(*tensors)
    for layout in ("transposed", "sliced"):
        with checked():
            got = sums_of(*(with_layout(t, layout) for t in tensors))
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


def test_a_choice_of_tile() -> None:
    """Large products get large tiles, small GPUs get tiles that fit their shared memory, and a tile always exists."""
    A = torch.empty(12608, 768, dtype=torch.bfloat16)
    assert launch.gemm_tile(A, 2304).m == 128
    assert all(launch.gemm_tile(A, N, tma=True) == TMA_TILES[0] for N in (768, 2304, 3072)), "the fastest tile"
    assert launch.gemm_tile(A[:64], 64).m == 64
    for tiles, size in ((HALF_TILES, 2), (FP32_TILES, 4), (TF32_TILES, 4)):
        smallest = min(tile.shared_memory(size) for tile in tiles)
        assert smallest <= 64 * 1024, "AMD's GPUs have 64 KiB"


def test_tf32_only_by_choice() -> None:
    A, settings = torch.empty(1), torch.backends.cuda.matmul
    before = settings.fp32_precision
    assert launch.precision(A) == "ieee"
    settings.fp32_precision = "tf32"
    try:
        assert launch.precision(A) == "tf32"
        assert launch.tiles(A) is TF32_TILES
        assert launch.precision(A.bfloat16()) == "ieee", "the setting does not apply to half precision"
    finally:
        settings.fp32_precision = before
    settings.allow_tf32 = True
    try:
        assert launch.precision(A) == "tf32", "torch's older name for the same choice"
    finally:
        settings.allow_tf32 = False


# --- producers, grouped form, large offsets ---------------------------------------------------------------------------


def put_out(values: Tensor, producer: str, gamma: Tensor | None = None, beta: Tensor | None = None) -> Tensor:
    if producer == "none":
        return values
    if producer == "norm":
        return F.layer_norm(values, values.shape[-1:], gamma, beta, 1e-3)
    return F.gelu(values, approximate="tanh" if producer == "gelu_tanh" else "none")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("producer", ["none", "norm"])
@pytest.mark.parametrize("absent", [None, (0, "h"), (0, "dh"), (1, "h"), (1, "dh")], ids=str)
def test_sums_of_two_layers(dtype: torch.dtype, producer: str, absent: tuple[int, str] | None) -> None:
    """The sums of two layers with different sizes, ranks and producers share two launches."""
    M, producers = 300, (producer, "gelu")
    layers: list[dict[str, Any]] = []
    for i, (d_out, d_in, R) in enumerate(((130, 33, 9), (20, 257, 70))):
        columns = {"gy": d_out, "h": R, "x": d_in, "dh": R}
        layers.append({name: matrix(M, n, dtype, 4 * i + j) for j, (name, n) in enumerate(columns.items())})
    if absent:
        layers[absent[0]][absent[1]] = None
    x = layers[0]["x"]
    gamma, beta = (matrix(1, 33, dtype, seed)[0] for seed in (8, 9))
    variance, mean = torch.var_mean(x.float(), 1, correction=0)
    norm = {"gamma": gamma, "beta": beta, "mean": mean, "rstd": (variance + 1e-3).rsqrt()}
    first = Layer(**layers[0], need_db=True, producer=producer, **(norm if producer == "norm" else {}))
    with checked() as names, poisoned_empty():
        found = reduce_tokens(first, Layer(**layers[1], producer="gelu"))
    assert names == ["reduce_two_kernel", "finish_two_kernel"]
    for i, (layer, (dG, dD, db)) in enumerate(zip(layers, found, strict=True)):
        exact = put_out(layer["x"].double(), producers[i], gamma.double(), beta.double())
        peer = put_out(layer["x"], producers[i], gamma, beta)
        ones, gy, h, dh = torch.ones(M, 1, dtype=dtype), layer["gy"], layer["h"], layer["dh"]
        needed = {"dG": (dG, h, h, gy), "dD": (dD, exact, peer, dh), "db": (db, ones, ones, gy if i == 0 else None)}
        for name, (got, of_formula, left, right) in needed.items():
            if left is None or right is None:
                assert got.shape == (0,)
                continue
            formula = of_formula.double().t() @ right.double()
            assert_close_budget(got.view_as(formula), formula, summed(left, right), factor=4, name=f"{i} {name}")


@pytest.mark.parametrize("producer", ["gelu", "gelu_tanh", "norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["gamma and beta", "neither"])
def test_producers(producer: str, dtype: torch.dtype, affine: bool) -> None:
    """One launch computes the output of the GELU or norm and h. The sums over tokens compute that output again."""
    for i, (M, _, K) in enumerate(SHAPES):
        R = (5, 16, 128, 1, 33)[i]
        values, P, dh = 3 * matrix(M, K, dtype, 0) + 1, matrix(K, R, torch.float32, 3, K**-0.5), matrix(M, R, dtype, 5)
        gamma, beta = (matrix(1, K, dtype, seed)[0] if affine else None for seed in (6, 7))
        with checked() as names, poisoned_empty():
            if producer == "norm":
                A, H, mean, rstd = norm_project(values, gamma, beta, 1e-3, P, dtype)
                saved = {"gamma": gamma, "beta": beta, "mean": mean, "rstd": rstd}
            else:
                A, H = gelu_project(values, P, producer, dtype)
                saved = {}
            _, dD, _ = sums_of(None, None, values, dh, producer=producer, **saved)
        assert names == ["project_kernel", "reduce_tokens_kernel", "finish_kernel"]
        wide = [t if t is None else t.double() for t in (gamma, beta)]
        exact = put_out(values.double(), producer, *wide)
        peer = put_out(values, producer, gamma, beta)
        assert_close_budget(A, exact, peer, name=f"{(M, K)}")
        assert_close_budget(H, exact @ P.double(), product(peer, P.to(dtype)), name=f"{(M, K, R)}")
        yardstick = summed(peer, dh)
        assert_close_budget(dD, exact.t() @ dh.double(), yardstick, factor=4, name=f"{(M, K, R)}")


@pytest.mark.parametrize("producer", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize(
    ("dtype", "tile"), [(torch.float32, FP32_TILES[-1]), (torch.bfloat16, HALF_TILES[-1])], ids=str
)
def test_slope_in_the_epilogue(producer: str, dtype: torch.dtype, tile: GemmTile) -> None:
    for M, N, K in SHAPES[:4]:  # the errors of only five numbers are not meaningful
        A, weight, _, P, T = operands(M, N, K, 9, dtype)
        Z = with_layout(2 * matrix(M, N, dtype, 8), "transposed")
        with checked(), poisoned_empty():
            Y, _ = lowrank_gemm(A, weight.t(), None, P, T, Z=Z, producer=producer, tile=tile)
        results = []
        for to in (torch.float64, dtype):
            z = Z.detach().to(to).requires_grad_()
            upstream = product(A.to(to), weight.to(to).t()) + product(product(A.to(to), P.to(to)), T.to(to))
            results.append(torch.autograd.grad(put_out(z, producer), z, upstream)[0])
        assert_close_budget(Y, *results, name=f"{(M, N, K)}")


@pytest.mark.parametrize("producer", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gelu_in_half_precision(producer: str, dtype: torch.dtype) -> None:
    """Apart from the final rounding, the errors of the GELU and of its slope are far below half precision."""
    ends = torch.tensor([0.0, 1e-45, 1e-38, 6.0, 6.1, 7.0, 1e4, 1e38])
    z = torch.cat(
        [torch.linspace(-9, 9, 20001), torch.logspace(-30, 4, 2001), -torch.logspace(-30, 4, 2001), ends, -ends]
    )
    A, _ = gelu_project(z[None], torch.zeros(len(z), 1), producer, dtype)
    wide = z.double().requires_grad_()
    exact = put_out(wide, producer)
    (slope,) = torch.autograd.grad(exact.sum(), wide)
    exact = torch.where(z < -40, 0.0, exact.detach())  # avoids NaN from infinity times 0
    rounding = (exact.to(dtype).double() - exact).abs().nan_to_num()
    excess = torch.where(A[0].isinf() & exact.to(dtype).isinf(), 0.0, (A[0].double() - exact).abs()) - rounding
    assert (excess <= 2 * (1e-5 * exact.abs() + 6e-9)).all()
    one, zero = torch.ones(1, 1, dtype=dtype), torch.zeros(1, 1)
    B = torch.ones(1, len(z), dtype=dtype)
    got, _ = lowrank_gemm(one, B, None, zero, zero.expand(1, len(z)), Z=z[None], producer=producer)
    assert ((got[0].double() - slope.nan_to_num()).abs() <= 5e-6).all()
    assert gelu_project(torch.full((1, 1), torch.nan), zero, producer, dtype)[0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_adapter_a_sample(dtype: torch.dtype) -> None:
    adapter = torch.tensor([2, -1, 0])
    for i, (M, N, K) in enumerate(SHAPES[:4]):
        R = (5, 65, 128, 1, 33)[i]
        _, weight, bias, _, _ = operands(M, N, K, R, dtype)
        A = torch.stack([matrix(M, K, dtype, seed) for seed in range(3)])
        P = torch.stack([matrix(K, R, torch.float32, 10 + seed, K**-0.5) for seed in range(3)])
        T = torch.stack([matrix(R, N, torch.float32, 20 + seed, R**-0.5) for seed in range(3)])
        P[1] = T[1] = float("nan")  # no sample uses this adapter
        with checked() as names, poisoned_empty():
            Y, _ = lowrank_gemm(A, weight.t(), bias, P, T, adapter=adapter)
        assert names == ["project_kernel", "lowrank_gemm_kernel"]
        pairs = [(P[2], T[2]), (torch.zeros(K, 1), torch.zeros(1, N)), (P[0], T[0])]
        exact, peer = (
            torch.stack(
                [
                    unfused(a.to(to), weight.t().to(to), bias.to(to), *(f.to(to) for f in pair))[0]
                    for a, pair in zip(A, pairs, strict=True)
                ]
            )
            for to in (torch.float64, dtype)
        )
        assert_close_budget(Y, exact, peer, name=f"{(M, N, K, R)}")


def far_apart(values: Tensor) -> Tensor:
    """Return the same rows, 2^30 elements apart, so that the offset of the third row does not fit a 32-bit integer."""
    rows, columns = values.shape
    memory = torch.empty(
        2**30 * (rows - 1) + columns, dtype=values.dtype
    )  # the system allocates only the pages that are used
    return memory.as_strided((rows, columns), (2**30, 1)).copy_(values)


def test_offsets_beyond_32_bits() -> None:
    A, weight, bias, P, T = operands(3, 20, 24, 5, torch.bfloat16)
    far = far_apart(A)
    expected = lowrank_gemm(A, weight.t(), bias, P, T)
    with checked():
        got = lowrank_gemm(far, weight.t(), bias, P, T)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    h = expected[1]
    sums = sums_of(A, h, A, h, need_db=True)
    with checked():
        far_sums = sums_of(far, h, far, h, need_db=True)
    assert all(torch.equal(a, b) for a, b in zip(far_sums, sums, strict=True))
    z = lowrank_gemm(A, weight[:20].t(), None, P, T, Z=A[:, :20], producer="gelu")[0]
    assert torch.equal(lowrank_gemm(A, weight[:20].t(), None, P, T, Z=far[:, :20], producer="gelu")[0], z)


def test_project_of_nothing() -> None:
    assert project(torch.empty(0, 8), torch.ones(8, 3)).shape == (0, 3)
