"""Test that the address checker finds planted errors, and that the interpreter treats bfloat16 like hardware."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from efft_kernels.testing import poisoned_empty
from efft_kernels.triton.lowrank_gemm import lowrank_gemm_kernel
from tests.efft_kernels.triton.address_checker import AddressError, checked


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
    """Launch the product of [32, 32] matrices with the given sizes and strides, which may be wrong."""
    T, H = torch.ones(16, 32), torch.ones(64, 16)
    lowrank_gemm_kernel[(triton.cdiv(M, 32) * triton.cdiv(N, 32),)](
        *(A, B, None, T, H, None, Y, None, 1, 1, M, N, 32, 16, stride_am, 1, 32, 1, 0, 32, 1, 0, 0, 0, 0),
        **{"PRODUCER": "none", "PRECISION": "ieee", "GROUP_M": 8},
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
            assert torch.equal(Y, A @ B + 16)
        else:
            with pytest.raises(Exception, match=message):
                plain_launch(A, B, Y, **arguments)


def test_planted_gap_is_found() -> None:
    """The memory between the rows of a view does not belong to the view."""
    A = torch.ones(32, 64)[:, :32]
    with checked(), pytest.raises(Exception, match="outside its arguments"):
        plain_launch(A, torch.ones(32, 32), torch.empty(32, 32), M=32, stride_am=32, N=32)


def test_planted_race_is_found() -> None:
    with checked():
        store_kernel[(4,)](torch.empty(4), 1)
        with pytest.raises(Exception, match=r"programs \(0, 0, 0\) and \(1, 0, 0\) write to one address"):
            store_kernel[(4,)](torch.empty(4), 0)


def test_planted_nan_is_found() -> None:
    """An element that a kernel does not write remains NaN."""
    with poisoned_empty():
        out = torch.empty(4)
    store_kernel[(3,)](out, 1)
    assert out.isnan().tolist() == [False, False, False, True]
    assert issubclass(AddressError, RuntimeError)
