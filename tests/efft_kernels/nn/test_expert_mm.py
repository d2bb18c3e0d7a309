"""Compare ``expert_mm``, which multiplies each expert's rows by the expert's matrix, with a loop in plain torch.

Other tests check the tensors saved for the backward pass and the registration of the operators.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from efft_kernels.nn.expert_mm import expert_mm

#: The number of rows of each expert: zero, one, several, zero for the first or last expert, zero for all.
COUNTS = [[0, 3, 0, 1, 4], [2, 0, 0, 0, 0], [0, 0, 0, 0, 5], [0, 0, 0, 0, 0]]


def make(counts: list[int], dtype: torch.dtype = torch.float64, more: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(sum(counts) + more, 6, dtype=dtype, requires_grad=True)
    W = torch.randn(len(counts), 6, 5, dtype=dtype, requires_grad=True)
    return x, W, torch.tensor(counts).cumsum(0).to(torch.int32)


def loop(x: Tensor, W: Tensor, counts: list[int]) -> Tensor:
    return torch.cat([rows @ W[e] for e, rows in enumerate(x[: sum(counts)].split(counts))])


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_product_and_gradients(counts: list[int]) -> None:
    x, W, offsets = make(counts, more=2)
    gy = torch.randn(sum(counts), 5, dtype=torch.float64)
    y = expert_mm(x, W, offsets)[: sum(counts)]
    exact = loop(x, W, counts)
    torch.testing.assert_close(y, exact)
    for got, right in zip(torch.autograd.grad(y, (x, W), gy), torch.autograd.grad(exact, (x, W), gy), strict=True):
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_first_and_second_derivatives(counts: list[int]) -> None:
    x, W, offsets = make(counts)
    assert torch.autograd.gradcheck(lambda x, W: expert_mm(x, W, offsets), (x, W))
    assert torch.autograd.gradgradcheck(lambda x, W: expert_mm(x, W, offsets), (x, W))


def test_strides_and_dtypes() -> None:
    """The matrices may be transposed, and the rows may be part of a wider tensor."""
    counts = COUNTS[0]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, W, offsets = make(counts, dtype)
        stored = W.detach().transpose(1, 2).contiguous().transpose(1, 2)
        wide = torch.cat([x.detach(), x.detach()], 1)[:, :6]
        y = expert_mm(wide, stored, offsets)
        assert y.dtype == dtype
        torch.testing.assert_close(y, loop(x, W, counts), atol=2e-2 if dtype != torch.float32 else 1e-5, rtol=2e-2)


def test_a_frozen_matrix_is_neither_kept_nor_differentiated() -> None:
    x, W, offsets = make(COUNTS[0])
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = expert_mm(x, W.detach(), offsets)
    assert not any(t.shape == x.shape for t in saved), "rows are needed only for the gradient of the matrices"
    y.sum().backward()
    assert x.grad is not None
    assert W.grad is None


def test_as_an_operator() -> None:
    x, W, offsets = make(COUNTS[0])
    torch.library.opcheck(torch.ops.efft.expert_mm.default, (x, W, offsets))
    gy = torch.randn(len(x), 5, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.efft.expert_mm_weight.default, (x, gy, offsets))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_on_a_gpu(counts: list[int], dtype: torch.dtype) -> None:
    """``expert_mm`` pads sizes that torch's grouped product does not accept, here 6 and 5 elements."""
    x, W, offsets = (t.detach().cuda() for t in make(counts, dtype, more=2))
    exact = loop(x.double(), W.double(), counts)
    torch.testing.assert_close(expert_mm(x, W, offsets)[: sum(counts)].double(), exact, atol=5e-2, rtol=5e-2)
