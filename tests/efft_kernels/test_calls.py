"""Test that calls of tt_linear skip the checks only if an equal call passed them, and record no graph without need."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from efft_kernels import Backend, _calls, backends, can_run, tt_linear, use_backend
from efft_kernels.backends import current_backend
from efft_kernels.testing import make_inputs

SIZES: dict[str, Any] = {"tokens": 6, "d_in": 8, "d_out": 4, "r1": 3, "r2": 3}


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    return make_inputs("tt_linear", **SIZES)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets an entry for every call that is checked."""
    module = sys.modules["efft_kernels.ops.tt_linear"]  # the attribute tt_linear of the package is the function
    choices: dict[Any, Backend] = {}
    monkeypatch.setattr(_calls, "choices", choices)
    monkeypatch.setattr(module, "choices", choices)
    made: list[str] = []
    check = module.check_linear

    def noted(op: str, *arguments: Any) -> None:
        made.append(op)
        check(op, *arguments)

    monkeypatch.setattr(module, "check_linear", noted)
    return made


def test_an_equal_call_is_not_checked_again(inputs: dict[str, Tensor], checks: list[str]) -> None:
    first = tt_linear(**inputs)
    assert torch.equal(tt_linear(**{**inputs, "x": inputs["x"].clone()}), first)
    assert len(checks) == 1


@pytest.mark.parametrize(
    ("name", "wrong", "error"),
    [
        ("x", lambda t: t[:, :-1], ValueError),
        ("x", lambda t: t.double(), ValueError),
        ("x", lambda t: t[0, 0], ValueError),
        ("x", lambda t: t.numpy(), TypeError),
        ("x", lambda t: t.tolist(), TypeError),
        ("W", lambda t: t[:-1], ValueError),
        ("W", lambda t: t.double(), ValueError),
        ("W", lambda t: t[None], ValueError),
        ("b", lambda t: t[:-1], ValueError),
        ("b", lambda t: t.double(), ValueError),
        ("D", lambda t: t[:-1], ValueError),
        ("D", lambda t: t[:, :-1], ValueError),
        ("G", lambda t: t[:-1], ValueError),
        ("G", lambda t: t.to("meta"), RuntimeError),
        ("D", lambda t: t.long(), RuntimeError),
    ],
)
def test_a_wrong_call_is_refused_after_a_right_one(
    inputs: dict[str, Tensor], name: str, wrong: Any, error: type[Exception]
) -> None:
    tt_linear(**inputs)
    for _ in range(2):
        with pytest.raises(error):
            tt_linear(**{**inputs, name: wrong(inputs[name])})


def test_the_backend_is_chosen_again_if_another_one_is_requested(inputs: dict[str, Tensor], checks: list[str]) -> None:
    tt_linear(**inputs)
    with use_backend(Backend.REFERENCE):
        assert current_backend() is Backend.REFERENCE
        tt_linear(**inputs)
    tt_linear(**inputs, backend="eager")
    tt_linear(**inputs)
    assert len(checks) == 3


def test_the_backend_is_chosen_again_if_a_library_is_missing(
    inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    tt_linear(**inputs)
    monkeypatch.setitem(backends.MISSING, "cpu", "it is not there")
    with pytest.raises(RuntimeError, match="it is not there"):
        tt_linear(**inputs, backend="cpu")
    torch.testing.assert_close(tt_linear(**inputs), tt_linear(**inputs, backend="reference"))


def test_autocast_casts_after_a_call_without_it(inputs: dict[str, Tensor]) -> None:
    for enabled in (False, True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert tt_linear(**inputs).dtype == (torch.bfloat16 if enabled else torch.float32)


def test_the_number_of_remembered_calls_is_bounded(
    inputs: dict[str, Tensor], checks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_calls, "_MOST", 2)
    for d_in in range(1, 6):
        tt_linear(inputs["x"][:, :d_in], inputs["W"][:, :d_in], inputs["b"], inputs["D"][:d_in], inputs["G"])
        assert len(_calls.choices) <= 2
    assert len(checks) == 5


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.EAGER, Backend.CPU])
def test_no_graph_is_recorded_without_need(inputs: dict[str, Tensor], backend: Backend, context: Any) -> None:
    if (reason := can_run(backend, inputs["x"])) is not None:
        pytest.skip(reason)
    inputs["x"].requires_grad_()
    expected = tt_linear(**inputs, backend=backend)
    with context(), torch.autograd.profiler.profile() as profile:
        got = tt_linear(**inputs, backend=backend)
    assert torch.equal(got, expected.detach())
    assert not any(event.name == "_TTLinear" for event in profile.function_events)
    assert got.is_inference() == (context is torch.inference_mode)


def test_forward_mode_differentiation_is_not_skipped(inputs: dict[str, Tensor]) -> None:
    """``no_grad`` does not disable forward-mode differentiation, which tt_linear does not support.

    The call must therefore fail instead of returning a result without the tangent.
    """
    with forward_ad.dual_level(), torch.no_grad():
        x = forward_ad.make_dual(inputs["x"], torch.ones_like(inputs["x"]))
        with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward mode|Forward"):
            tt_linear(**{**inputs, "x": x}, backend="eager")
