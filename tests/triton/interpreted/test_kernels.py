"""Every kernel in every form and tile of the tables on ragged shapes, addresses checked and buffers full of NaN."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from efft_kernels.testing import assert_close_budget, poisoned_empty, with_layout
from efft_kernels.triton import launch, reduce_tokens
from efft_kernels.triton.interpreter import AddressError, checked
from efft_kernels.triton.launch import FP32_TILES, HALF_TILES, RECOMPUTE_RANK, TF32_TILES, GemmTile
from efft_kernels.triton.lowrank_gemm import lowrank_gemm, lowrank_gemm_kernel, project

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(70, 90, 100), (1, 16, 300), (129, 257, 33), (64, 128, 64), (5, 1, 1)]


def matrix(rows: int, columns: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(rows, columns, generator=generator, dtype=torch.float64)).to(dtype)


def operands(M: int, N: int, K: int, R: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """A, Bᵀ (so that B is as a weight lies in memory), bias, P and T with fp32 factors."""
    return (
        matrix(M, K, dtype, 0),
        matrix(N, K, dtype, 1, K**-0.5),
        matrix(1, N, dtype, 2)[0],
        matrix(K, R, torch.float32, 3, K**-0.5),
        matrix(R, N, torch.float32, 4, R**-0.5),
    )


def unfused(A: Tensor, B: Tensor, bias: Tensor, P: Tensor, T: Tensor) -> tuple[Tensor, Tensor]:
    """(Y, H) by the plain formula in the operands' precision."""
    H = A @ P.to(A.dtype)
    return A @ B + H @ T.to(A.dtype) + bias, H


@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "split"])
@pytest.mark.parametrize(
    ("dtype", "tile"),
    [
        *((torch.float32, tile) for tile in (*FP32_TILES, *TF32_TILES)),
        *((dtype, tile) for tile in HALF_TILES for dtype in DTYPES[1:]),
    ],
    ids=lambda value: f"{value.m}x{value.n}x{value.k}" if isinstance(value, GemmTile) else str(value),
)
def test_gemm(dtype: torch.dtype, recompute: bool, tile: GemmTile) -> None:
    for i, (M, N, K) in enumerate(SHAPES):
        R = (5, 16, 31, 1, 32)[i] if recompute else (5, 65, 128, 1, 33)[i]
        A, weight, bias, P, T = operands(M, N, K, R, dtype)
        with checked() as names, poisoned_empty():
            Y, H = lowrank_gemm(A, weight.t(), bias, P, T, tile=tile, recompute=recompute)
        assert names == ["project_kernel"] * (not recompute) + ["lowrank_gemm_kernel"]
        exact = unfused(A.double(), weight.double().t(), bias.double(), P.double(), T.double())
        for got, formula, peer in zip((Y, H), exact, unfused(A, weight.t(), bias, P, T), strict=True):
            assert_close_budget(got, formula, peer, name=f"{(M, N, K, R)}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_update_alone(dtype: torch.dtype) -> None:
    """B and bias are zero: what comes out is the update, whose error is not hidden by the base."""
    A, weight, bias, P, T = operands(70, 90, 100, 24, dtype)
    zero, none = torch.zeros_like(weight), torch.zeros_like(bias)
    for recompute in (True, False):
        Y, _ = lowrank_gemm(A, zero.t(), None, P, T, recompute=recompute)
        exact, peer = (A.double() @ P.double()) @ T.double(), unfused(A, zero.t(), none, P, T)[0]
        assert_close_budget(Y, exact, peer)


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_strides(layout: str) -> None:
    A, weight, bias, P, T = (with_layout(t, layout) for t in operands(70, 90, 100, 24, torch.float32))
    expected = unfused(A, weight.t(), bias, P, T)
    for recompute in (True, False):
        with checked():
            got = lowrank_gemm(A, weight.t(), bias, P, T, recompute=recompute)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("splits", [1, 2, 3, 7, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_over_tokens(dtype: torch.dtype, splits: int | None) -> None:
    for M, d_out, d_in, R in [(300, 130, 70, 9), (64, 16, 257, 65), (1, 1, 1, 1), (0, 40, 24, 5), (700, 33, 32, 128)]:
        gy, x = matrix(M, d_out, dtype, 0), matrix(M, d_in, dtype, 1)
        h, dh = matrix(M, R, dtype, 2), matrix(M, R, dtype, 3)
        with checked() as names, poisoned_empty():
            dG, dD = reduce_tokens.reduce_tokens(gy, h, x, dh, splits)
        assert names == ["reduce_tokens_kernel"], "both in one launch"
        for got, left, right in ((dG, h, gy), (dD, x, dh)):
            assert got.dtype == torch.float32
            exact = left.double().t() @ right.double()
            assert_close_budget(got, exact, left.float().t() @ right.float(), factor=4, name=f"{(M, R, splits)}")
        again = reduce_tokens.reduce_tokens(gy, h, x, dh, splits)
        assert torch.equal(again[0], dG)
        assert torch.equal(again[1], dD)
        assert torch.equal(reduce_tokens.reduce_tokens(None, None, x, dh, splits)[1], dD)
        assert torch.equal(reduce_tokens.reduce_tokens(gy, h, None, None, splits)[0], dG)


def test_sums_over_tokens_of_any_strides() -> None:
    tensors = [matrix(70, n, torch.float32, seed) for seed, n in enumerate((33, 9, 20, 9))]
    expected = reduce_tokens.reduce_tokens(*tensors)
    for layout in ("transposed", "sliced"):
        with checked():
            got = reduce_tokens.reduce_tokens(*(with_layout(t, layout) for t in tensors))
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


def test_a_choice_of_tile() -> None:
    """Big tiles for big products, what fits the shared memory for small GPUs, and never nothing."""
    A = torch.empty(12608, 768, dtype=torch.bfloat16)
    assert launch.gemm_tile(A, 2304, 0).m == 128
    assert launch.gemm_tile(A[:64], 64, 0).m == 64
    for tiles, size in ((HALF_TILES, 2), (FP32_TILES, 4), (TF32_TILES, 4)):
        smallest = min(tile.shared_memory(size, RECOMPUTE_RANK) for tile in tiles)
        assert smallest <= 64 * 1024, "AMD's 64 KiB"


def test_tf32_only_by_choice() -> None:
    A, settings = torch.empty(1), torch.backends.cuda.matmul
    before = settings.fp32_precision
    assert launch.precision(A) == "ieee"
    settings.fp32_precision = "tf32"
    try:
        assert launch.precision(A) == "tf32"
        assert launch.tiles(A) is TF32_TILES
        assert launch.precision(A.bfloat16()) == "ieee", "no say in half precision"
    finally:
        settings.fp32_precision = before
    settings.allow_tf32 = True
    try:
        assert launch.precision(A) == "tf32", "torch's older name for the same choice"
    finally:
        settings.allow_tf32 = False


# --- the interpreter, and that its checks find what they are for ------------------------------------------------------


@triton.jit
def cast_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n).to(y.dtype.element_ty), mask=i < n)


@triton.jit
def store_kernel(y, stride):
    tl.store(y + tl.program_id(0) * stride, 1.0)


@triton.jit
def bfloat16_sum_kernel(x, y):
    tl.store(y, tl.load(x) + tl.load(x))


def test_bfloat16_is_rounded_as_hardware_does() -> None:
    values = torch.randn(1000) * torch.logspace(-30, 30, 1000)
    values[:6] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1.00390625, 3.3895314e38])
    rounded = torch.empty(1000, dtype=torch.bfloat16)
    cast_kernel[(1,)](values, rounded, 1000, BLOCK=1024)
    assert torch.equal(rounded.view(torch.int16)[1:], values.bfloat16().view(torch.int16)[1:])
    assert rounded[0].isnan()
    back = torch.empty(1000)
    cast_kernel[(1,)](rounded, back, 1000, BLOCK=1024)
    assert torch.equal(back[1:], rounded.float()[1:])
    with pytest.raises(Exception, match="arithmetic on bfloat16"):
        bfloat16_sum_kernel[(1,)](rounded, rounded)


def plain_launch(A: Tensor, B: Tensor, Y: Tensor, M: int, stride_am: int, N: int) -> None:
    """The product of [32, 32] matrices with sizes and strides as told, right or wrong."""
    P, T, H = torch.ones(32, 16), torch.ones(16, 32), torch.empty(64, 16)
    lowrank_gemm_kernel[(triton.cdiv(M, 32) * triton.cdiv(N, 32),)](
        *(A, B, None, P, T, H, Y, M, N, 32, 16, stride_am, 1, 32, 1, 0, 16, 1, 32, 1),
        **{"RECOMPUTE": True, "PRECISION": "ieee", "GROUP_M": 8},
        **{"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "BLOCK_R": 16},
    )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({}, None),
        ({"M": 33}, r"program \(1, 0, 0\) reads .* elements outside its arguments"),
        ({"stride_am": 33}, r"program \(0, 0, 0\) reads .* elements outside"),
        ({"N": 33}, r"reads .* elements outside|writes .* elements outside"),
    ],
    ids=["none", "too many rows", "wrong stride", "too many columns"],
)
def test_planted_addresses_are_found(fault: dict[str, int], message: str | None) -> None:
    A, B, Y = torch.ones(32, 32), torch.ones(32, 32), torch.empty(32, 32)
    arguments = {"M": 32, "stride_am": 32, "N": 32, **fault}
    with checked() as names:
        if message is None:
            plain_launch(A, B, Y, **arguments)
            assert names == ["lowrank_gemm_kernel"]
            assert torch.equal(Y, A @ B + 32 * 16)
        else:
            with pytest.raises(Exception, match=message):
                plain_launch(A, B, Y, **arguments)


def test_planted_gap_is_found() -> None:
    """Between the rows of a view lies somebody else's memory."""
    A = torch.ones(32, 64)[:, :32]
    with checked(), pytest.raises(Exception, match="outside its arguments"):
        plain_launch(A, torch.ones(32, 32), torch.empty(32, 32), M=32, stride_am=32, N=32)


def test_planted_race_is_found() -> None:
    with checked():
        store_kernel[(4,)](torch.empty(4), 1)
        with pytest.raises(Exception, match=r"programs \(0, 0, 0\) and \(1, 0, 0\) write to one address"):
            store_kernel[(4,)](torch.empty(4), 0)


def test_planted_nan_is_found() -> None:
    """A buffer that a kernel does not fill stays full of NaN."""
    with poisoned_empty():
        out = torch.empty(4)
    store_kernel[(3,)](out, 1)
    assert out.isnan().tolist() == [False, False, False, True]
    assert issubclass(AddressError, RuntimeError)


def test_project_of_nothing() -> None:
    assert project(torch.empty(0, 8), torch.ones(8, 3)).shape == (0, 3)
