"""Test the error budget: it must accept rows (implementations of a layer) with accurate results and reject others."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.budget import Budget, exact, small_update_error, verdict
from benchmarks.counts import Sizes
from benchmarks.ops.cases import Inputs, make_inputs
from benchmarks.ops.rows import ROWS

CHAIN = ROWS["chain"]


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def inputs(request: pytest.FixtureRequest) -> Inputs:
    return make_inputs(Sizes(61, 48, 96, 16, request.param.itemsize), request.param, n_cores=3)


def test_exact_results_are_those_of_autograd_in_fp64(inputs: Inputs) -> None:
    x, W, b, D, G = (t.double().requires_grad_() for t in (inputs.x, inputs.W, inputs.b, inputs.D, inputs.G))
    for adapts in (True, False):
        y = x @ W.t() + b + (x @ D @ G if adapts else 0)
        leaves = {"dx": x, "dD": D, "dG": G} if adapts else {"dx": x}
        gradients = torch.autograd.grad(y, list(leaves.values()), inputs.gy.double())
        expected = {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}
        found = exact(inputs, adapts)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_a_right_row_passes(inputs: Inputs) -> None:
    assert verdict(CHAIN, inputs) is None


@pytest.mark.parametrize("name", ["y", "dx", "dD", "dG"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t * 1.02,
        lambda t: t.index_fill(0, torch.tensor(3), 0),
        lambda t: t.index_fill(0, torch.tensor(3), math.nan),
    ],
    ids=["scaled by 1.02", "a row of zeros", "a row of NaN"],
)
def test_one_wrong_result_is_named(inputs: Inputs, name: str, spoil: Callable[[Tensor], Tensor]) -> None:
    results = CHAIN.build(inputs).results()
    results[name] = spoil(results[name])
    reason = Budget(inputs).verdict(CHAIN, results)
    assert reason is not None
    prefix, _, named = reason.rpartition(": ")
    assert prefix == "error over 2 times that of the plain formula in the same precision"
    assert named.split()[0] == name
    assert "," not in named


def test_an_update_that_is_missing_does_not_hide_in_y(inputs: Inputs) -> None:
    results = CHAIN.build(inputs).results()
    results["y"] = ROWS["floor"].build(inputs).results()["y"]
    assert "y " in (Budget(inputs).verdict(CHAIN, results) or "")


def test_results_of_another_kind_are_refused(inputs: Inputs) -> None:
    budget, results = Budget(inputs), CHAIN.build(inputs).results()
    without = {name: value for name, value in results.items() if name != "dG"}
    assert budget.verdict(CHAIN, without) == "the row returns dD, dx, y instead of dD, dG, dx, y"
    assert "dD is torch.float64" in (budget.verdict(CHAIN, results | {"dD": results["dD"].double()}) or "")
    assert "instead of torch.float32 [48, 16]" in (budget.verdict(CHAIN, results | {"dD": results["dD"].t()}) or "")


def test_a_weight_that_took_the_update_shows_its_rounding(inputs: Inputs) -> None:
    """Test rows that add the update to the weight.

    They pass the check, in which the update is as large as the weight. A small update is inaccurate in half precision.
    """
    for name in ("naive", "merged"):
        assert verdict(ROWS[name], inputs) is None
        if inputs.x.dtype != torch.float32:
            assert small_update_error(ROWS[name], inputs) > 5
    for name in ("chain", "efft:eager"):
        assert small_update_error(ROWS[name], inputs) < 1.5
