"""Compare tt_linear_grouped with one dense matrix per sample in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from efft_kernels import Backend, tt_linear, tt_linear_grouped
from efft_kernels.testing import LAYOUTS, assert_close_budget, make_inputs, poisoned_empty, with_layout


def dense(x: Tensor, W: Tensor, b: Tensor | None, D: Tensor, G: Tensor, adapter: Tensor) -> Tensor:
    x, W, D, G = (t.double() for t in (x, W, D, G))
    matrices = [W.t() + D[a] @ G[a] if a >= 0 else W.t() for a in adapter.tolist()]
    y = torch.stack([sample @ matrix for sample, matrix in zip(x, matrices, strict=True)])
    return y if b is None else y + b.double()


@pytest.mark.parametrize(
    "sizes", [(29, 24, 40, 5), (1, 33, 17, 1), (70, 100, 130, 33), (197, 16, 16, 128), (64, 64, 64, 16)]
)
def test_output(
    backend: Backend,
    device: str,
    low: torch.dtype,
    product: Callable[[Tensor, Tensor], Tensor],
    sizes: tuple[int, ...],
) -> None:
    tokens, d_in, d_out, r1 = sizes
    options: dict[str, Any] = {"tokens": tokens, "d_in": d_in, "d_out": d_out, "r1": r1, "dtype": low}
    inputs = make_inputs("tt_linear_grouped", **options, factor_dtype=torch.float32, device=device)
    inputs["adapter"] = torch.tensor([2, -1, 0, 2, 1], device=device)
    with poisoned_empty():
        got = tt_linear_grouped(**inputs, backend=backend)
    one_by_one = [
        product(x, inputs["W"].t())
        + inputs["b"]
        + (0 if a < 0 else product(product(x, inputs["D"][a].to(low)), inputs["G"][a].to(low)))
        for x, a in zip(inputs["x"], inputs["adapter"].tolist(), strict=True)
    ]
    assert_close_budget(got, dense(**inputs), torch.stack(one_by_one))


def test_same_adapter_everywhere(backend: Backend, device: str) -> None:
    inputs = make_inputs("tt_linear_grouped", device=device)
    inputs["adapter"] = torch.ones(5, dtype=torch.int64, device=device)
    single = {**inputs, "D": inputs["D"][1], "G": inputs["G"][1]}
    del single["adapter"]
    expected = tt_linear(**single, backend=backend)
    torch.testing.assert_close(tt_linear_grouped(**inputs, backend=backend), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(backend: Backend, device: str, layout: str) -> None:
    inputs = make_inputs("tt_linear_grouped", device=device)
    for name in ("x", "W", "b", "D", "G"):
        inputs[name] = with_layout(inputs[name], layout)
    inputs["adapter"] = torch.tensor([2, 9, 0, 9, -1, 9, 0, 9, 1], device=device)[::2]
    torch.testing.assert_close(
        tt_linear_grouped(**inputs, backend=backend).double(), dense(**inputs), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize(("samples", "tokens"), [(0, 7), (3, 0)])
def test_nothing(backend: Backend, device: str, samples: int, tokens: int) -> None:
    inputs = make_inputs("tt_linear_grouped", samples=samples, tokens=tokens, device=device)
    assert tt_linear_grouped(**inputs, backend=backend).shape == (samples, tokens, 40)


def test_only_factors_in_use_are_read(backend: Backend, device: str) -> None:
    inputs = make_inputs("tt_linear_grouped", device=device)
    inputs["adapter"] = torch.tensor([2, -1, 2, 2, -1], device=device)
    inputs["D"][:2] = inputs["G"][:2] = float("nan")
    assert tt_linear_grouped(**inputs, backend=backend).isfinite().all()


@pytest.mark.parametrize("factor", ["D", "G"])
def test_one_factor_that_is_not_finite_stays_with_its_adapter(backend: Backend, device: str, factor: str) -> None:
    inputs = make_inputs("tt_linear_grouped", device=device)
    inputs["adapter"] = torch.tensor([0, -1, 2, -7, 1], device=device)
    expected = dense(**inputs)
    inputs[factor][0] = float("inf")
    y = tt_linear_grouped(**inputs, backend=backend).double()
    torch.testing.assert_close(y[1:], expected[1:], rtol=1e-5, atol=1e-4)
    assert not y[0].isfinite().any()


def test_autocast(backend: Backend, device: str) -> None:
    inputs = make_inputs("tt_linear_grouped", device=device)
    inputs["D"].requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        y = tt_linear_grouped(**inputs, backend=backend)
    assert y.dtype == torch.bfloat16
    (dD,) = torch.autograd.grad(y.sum(), inputs["D"])
    assert dD.dtype == torch.float32
    with torch.no_grad():
        assert not tt_linear_grouped(**inputs, backend=backend).requires_grad


@pytest.mark.parametrize(
    "need", [("x", "W", "b", "D", "G"), ("x",), ("D",), ("G",), ("W",), ("x", "G"), ("b",)], ids=str
)
def test_gradients(
    backend: Backend, device: str, exact: torch.dtype, assert_exact: Callable[..., None], need: tuple[str, ...]
) -> None:
    inputs = make_inputs("tt_linear_grouped", dtype=exact, device=device)
    inputs["adapter"] = torch.tensor([2, -1, 0, 2, -3], device=device)
    wide = {k: v.double().requires_grad_(k in need) if v.is_floating_point() else v for k, v in inputs.items()}
    narrow = {k: v.requires_grad_(k in need) if v.is_floating_point() else v for k, v in inputs.items()}
    y, formula = tt_linear_grouped(**narrow, backend=backend), dense(**wide)
    gy = torch.randn(formula.shape, dtype=exact, device=device)
    got = torch.autograd.grad(y, [narrow[k] for k in need], gy)
    expected = torch.autograd.grad(formula, [wide[k] for k in need], gy.double())
    for name, value, right in zip(need, got, expected, strict=True):
        assert_exact(value, right, name)


def test_gradients_of_gradients(fp64: Backend) -> None:
    sizes: dict[str, Any] = {"tokens": 2, "d_in": 3, "d_out": 2, "r1": 2, "samples": 3, "n_adapters": 2}
    inputs = make_inputs("tt_linear_grouped", **sizes, dtype=torch.float64)
    inputs["adapter"] = torch.tensor([1, -1, 1])
    names = ("x", "W", "b", "D", "G")
    leaves = [inputs[k].requires_grad_() for k in names]

    def function(*values: Tensor) -> Tensor:
        return tt_linear_grouped(*values, inputs["adapter"], backend=fp64).sin()

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_an_adapter_that_does_not_exist(kernels: Backend, device: str) -> None:
    """The registered ops return NaN or fail for a wrong index; they never use the factors of another adapter.

    Only the public function checks the indices, because a check waits for the GPU.
    """
    inputs = make_inputs("tt_linear_grouped", device=device)
    inputs["adapter"] = torch.tensor([0, 3, -1, 2, 10**12], device=device)
    op = getattr(torch.ops.efft.tt_linear_grouped, kernels.value)
    if kernels is Backend.CPU:
        with pytest.raises(RuntimeError, match="there are 3 adapters"):
            op(*inputs.values())
        return
    y = op(*inputs.values())
    assert y[[1, 4]].isnan().all()
    assert y[[0, 2, 3]].isfinite().all()


def test_registered_op(kernels: Backend, device: str) -> None:
    inputs = make_inputs("tt_linear_grouped", device=device)
    torch.library.opcheck(getattr(torch.ops.efft.tt_linear_grouped, kernels.value), tuple(inputs.values()))


def test_compiled_without_graph_break(kernels: Backend, device: str) -> None:
    inputs = make_inputs("tt_linear_grouped", device=device)
    compiled = torch.compile(tt_linear_grouped, fullgraph=True, backend="aot_eager")
    for adapter in ([2, -1, 0, 2, 1], [0, 0, 1, -1, -1]):
        inputs["adapter"] = torch.tensor(adapter, device=device)
        expected = tt_linear_grouped(**inputs, backend=kernels)
        torch.testing.assert_close(compiled(**inputs, backend=kernels), expected)
    if device == "cpu":
        inputs["adapter"][0] = 3
        with pytest.raises(RuntimeError, match="an index beyond the adapters"):
            compiled(**inputs, backend=kernels)


def test_wrong_calls(backend: Backend) -> None:
    inputs = make_inputs("tt_linear_grouped")
    for changes, message in (
        ({"x": inputs["x"][0]}, r"expected x \[samples, tokens, d_in\]"),
        ({"D": inputs["D"][1:]}, r"got shapes .* \[2, 24, 5\] and \[3, 5, 40\]"),
        ({"D": inputs["D"][:0], "G": inputs["G"][:0]}, "n_adapters >= 1"),
        ({"adapter": inputs["adapter"][1:]}, r"adapter must be \[samples\] = \[5\], got shape \[4\]"),
        ({"adapter": inputs["adapter"].int()}, "adapter must be int64, got torch.int32"),
        ({"adapter": torch.full((5,), 3)}, "there are 3 adapters, got index 3"),
        ({"W": inputs["W"].double()}, "W and b must have the dtype of x"),
    ):
        with pytest.raises(ValueError, match=message):
            tt_linear_grouped(**{**inputs, **changes}, backend=backend)
