"""Measure the overhead of calling ops and layers, on tensors so small that their arithmetic takes almost no time.

    pytest benchmarks/      # prints a table; accepts the options of pytest-benchmark, such as --benchmark-save

Each benchmark measures a forward pass, or a forward and backward pass. The linear function and the linear layer of
torch are measured for comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efft_kernels import Backend, EfftLinear, can_run, tt_contract, tt_linear, use_backend
from efft_kernels.testing import backends, make_inputs

SIZES: dict[str, Any] = {"tokens": 4, "d_in": 8, "d_out": 8, "r1": 2, "r2": 2}
PHASES = ("forward", "forward_backward")


def call(function: Callable[[], Tensor], phase: str) -> Callable[[], object]:
    if phase == "forward":
        return function
    gy = torch.ones_like(function())
    return lambda: function().backward(gy)


@pytest.fixture(params=backends(), ids=lambda backend: backend.value)
def backend(request: pytest.FixtureRequest) -> Backend:
    reason = can_run(request.param, torch.ones(1))
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.benchmark(group="linear op")
def test_torch_linear(benchmark: Any, phase: str) -> None:
    inputs = make_inputs("tt_linear", **SIZES)
    x = inputs["x"].requires_grad_()
    benchmark(call(lambda: F.linear(x, inputs["W"], inputs["b"]), phase))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.benchmark(group="linear op")
def test_tt_linear(benchmark: Any, backend: Backend, phase: str) -> None:
    inputs = make_inputs("tt_linear", **SIZES)
    for name in ("x", "D", "G"):
        inputs[name].requires_grad_()
    benchmark(call(lambda: tt_linear(**inputs, backend=backend), phase))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.benchmark(group="contraction")
def test_tt_contract(benchmark: Any, backend: Backend, phase: str) -> None:
    inputs = make_inputs("tt_contract", **SIZES)
    for name in ("C", "V"):
        inputs[name].requires_grad_()
    benchmark(call(lambda: tt_contract(**inputs, backend=backend), phase))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.benchmark(group="linear layer")
def test_torch_layer(benchmark: Any, phase: str) -> None:
    layer, x = nn.Linear(8, 8).requires_grad_(False), torch.ones(4, 8, requires_grad=True)
    benchmark(call(lambda: layer(x), phase))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.benchmark(group="linear layer")
def test_efft_layer(benchmark: Any, backend: Backend, phase: str) -> None:
    layer, x = EfftLinear.from_linear(nn.Linear(8, 8), rank=2), torch.ones(4, 8, requires_grad=True)
    with use_backend(backend):
        benchmark(call(lambda: layer(x), phase))
