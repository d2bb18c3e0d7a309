"""Compare tt_merge_ with W + sign (D G)ᵀ in fp64, rounded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from efft_kernels import Backend, tt_merge_, use_backend
from efft_kernels.testing import assert_close_budget, make_inputs, poisoned_empty, with_layout


def dense(W: Tensor, D: Tensor, G: Tensor, sign: float) -> Tensor:
    return W.double() + sign * (D.double() @ G.double()).t()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_merges_in_place(backend: Backend, device: str, sign: float) -> None:
    inputs = {**make_inputs("tt_merge_", d_in=57, d_out=71, device=device), "sign": sign}
    exact = dense(**inputs)
    peer = inputs["W"] + sign * (inputs["D"] @ inputs["G"]).t()
    memory = inputs["W"].data_ptr()
    assert tt_merge_(**inputs, backend=backend) is inputs["W"]
    assert inputs["W"].data_ptr() == memory
    assert_close_budget(inputs["W"], exact, peer)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_weight_is_rounded_once(
    backend: Backend, device: str, half: torch.dtype, autocast: bool
) -> None:
    """Arithmetic in the weight's precision would round a third of the elements incorrectly."""
    inputs = make_inputs("tt_merge_", d_in=57, d_out=71, dtype=half, factor_dtype=torch.float32, device=device)
    nearest = dense(**inputs).to(half)
    with use_backend(backend), torch.autocast(device, half, enabled=autocast):
        W = tt_merge_(**inputs)
    assert (nearest == W).double().mean() > 0.99
    torch.testing.assert_close(W, nearest, rtol=torch.finfo(half).eps, atol=0)


@given(
    sizes=st.tuples(st.integers(1, 33), st.integers(1, 33), st.integers(1, 128)),
    layouts=st.tuples(
        st.sampled_from(["contiguous", "transposed", "sliced"]),  # stride 0 is excluded: the op writes to the weight
        *[st.sampled_from(["contiguous", "transposed", "sliced", "expanded"])] * 2,
    ),
    sign=st.sampled_from([1.0, -1.0, 0.5]),
)
def test_any_shape_and_layout(
    backend: Backend,
    device: str,
    exact: torch.dtype,
    assert_exact: Callable[..., None],
    sizes: tuple[int, int, int],
    layouts: tuple[str, ...],
    sign: float,
) -> None:
    d_in, d_out, r1 = sizes
    inputs = make_inputs("tt_merge_", d_in=d_in, d_out=d_out, r1=r1, dtype=exact, device=device)
    W, D, G = (with_layout(inputs[k], layout) for k, layout in zip("WDG", layouts, strict=True))
    formula, strides = dense(W, D, G, sign), W.stride()
    with use_backend(backend):
        tt_merge_(W, D, G, sign)
    assert_exact(W, formula)
    assert W.stride() == strides


def test_a_zero_update_changes_no_bit(backend: Backend, device: str, low: torch.dtype) -> None:
    inputs = make_inputs("tt_merge_", update=0.0, dtype=low, device=device)
    before = inputs["W"].clone()
    assert torch.equal(tt_merge_(**inputs, backend=backend), before)


def test_no_gradient_is_recorded(backend: Backend) -> None:
    inputs = make_inputs("tt_merge_")
    W = torch.nn.Parameter(inputs["W"])
    exact = dense(**inputs)
    tt_merge_(**{**inputs, "W": W, "D": inputs["D"].requires_grad_()}, backend=backend)
    assert W.is_leaf
    assert W.grad_fn is None
    torch.testing.assert_close(W.detach(), exact.float())


def test_reads_nothing_it_did_not_write(backend: Backend, device: str, low: torch.dtype) -> None:
    inputs = make_inputs("tt_merge_", dtype=low, device=device)
    clean = tt_merge_(**{**inputs, "W": inputs["W"].clone()}, backend=backend)
    with poisoned_empty():
        assert torch.equal(tt_merge_(**inputs, backend=backend), clean)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"W": torch.ones(24)}, r"W must be \[d_out, d_in\], got shape \[24\]"),
        ({"W": torch.ones(24, 40)}, r"D must be \[d_in, r1\] = \[40, 5\], got shape \[24, 5\]"),
        ({"D": torch.ones(24)}, r"D must be \[d_in, r1\], got shape \[24\]"),
        ({"G": torch.ones(5, 41)}, r"G must be \[r1, d_out\] = \[5, 40\], got shape \[5, 41\]"),
    ],
)
def test_wrong_shapes(backend: Backend, changed: dict[str, Tensor], message: str) -> None:
    inputs = make_inputs("tt_merge_")
    before = inputs["W"].clone()
    with pytest.raises(ValueError, match="^tt_merge_: " + message):
        tt_merge_(**{**inputs, **changed}, backend=backend)
    assert torch.equal(inputs["W"], before)


@pytest.mark.parametrize("name", ["W", "D", "G"])
def test_tensors_of_another_device_or_kind(backend: Backend, name: str) -> None:
    inputs = make_inputs("tt_merge_")
    with pytest.raises(RuntimeError, match=r"one device, got (cpu and meta|meta and cpu)"):
        tt_merge_(**{**inputs, name: inputs[name].to("meta")}, backend=backend)
    with pytest.raises(RuntimeError, match=r"got torch.int64"):
        tt_merge_(**{**inputs, name: inputs[name].long()}, backend=backend)


def test_expanded_weight_is_refused(backend: Backend) -> None:
    inputs = make_inputs("tt_merge_")
    expanded = inputs["W"][:1].expand_as(inputs["W"])
    with pytest.raises(ValueError, match=r"tt_merge_: W is an expanded tensor .*; clone W"):
        tt_merge_(**{**inputs, "W": expanded}, backend=backend)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_registered_op_is_well_behaved(kernels: Backend, layout: str, dtype: torch.dtype) -> None:
    inputs = make_inputs("tt_merge_", dtype=dtype, factor_dtype=torch.float32)
    W, D, G = (with_layout(inputs[k], layout) for k in "WDG")
    torch.library.opcheck(getattr(torch.ops.efft.tt_merge_, kernels.value), (W, D, G, -1.0))


def test_runs_as_one_registered_op(kernels: Backend, record: Callable[[], Any]) -> None:
    with record() as seen:
        tt_merge_(**make_inputs("tt_merge_"), backend=kernels)
    assert seen.registered == [f"efft::tt_merge_.{kernels.value}"]


def test_compiles_without_graph_breaks(backend: Backend) -> None:
    inputs = make_inputs("tt_merge_")
    expected = tt_merge_(**{**inputs, "W": inputs["W"].clone()}, backend=backend)
    with use_backend(backend):
        torch.compile(tt_merge_, fullgraph=True, backend="aot_eager")(**inputs)
    assert torch.equal(inputs["W"], expected)


@pytest.mark.parametrize("direct", [False, True], ids=["tt_merge_", "the registered op"])
def test_autograd_notices_the_change(backend: Backend, direct: bool) -> None:
    """Backward must fail because a saved tensor has changed, as with torch's own in-place operators."""
    inputs = make_inputs("tt_merge_")
    x = torch.randn(3, 24, requires_grad=True)
    y = torch.nn.functional.linear(x, inputs["W"])
    before = inputs["W"]._version
    if direct and backend is not Backend.REFERENCE:
        getattr(torch.ops.efft.tt_merge_, backend.value)(*inputs.values())
    else:
        tt_merge_(**inputs, backend=backend)
    assert inputs["W"]._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_weight_of_inference_mode(backend: Backend) -> None:
    with torch.inference_mode():
        inputs = make_inputs("tt_merge_")
        exact = dense(**inputs)
        torch.testing.assert_close(tt_merge_(**inputs, backend=backend), exact.float())
