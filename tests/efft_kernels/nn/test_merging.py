"""Test EfftLinear.merge and unmerge.

Unmerging must restore the exact weight. A merged layer must compute the same function as before, and ``merge`` must
report the rounding error.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efft_kernels import EfftLinear
from efft_kernels.nn.linear import MergeLoss
from efft_kernels.testing import assert_close_budget


def make(dtype: torch.dtype, ratio: float = 0.1, sizes: tuple[int, int] = (48, 64), **kwargs: Any) -> EfftLinear:
    """Return a layer whose update has ``ratio`` times the norm of its weight."""
    layer = EfftLinear.from_linear(nn.Linear(*sizes, dtype=dtype), rank=4, **kwargs)
    for factor in (layer.factors.U, layer.factors.C, layer.factors.V):
        nn.init.normal_(factor)
    with torch.no_grad():
        layer.factors.V.mul_(ratio * layer.weight.double().norm() / layer.delta_weight().double().norm())
    return layer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_unmerging_restores_every_bit(dtype: torch.dtype) -> None:
    layer = make(dtype)
    memory, before, x = layer.weight.data_ptr(), layer.weight.clone(), torch.randn(3, 48, dtype=dtype)
    y = layer(x)
    loss = layer.merge()
    assert isinstance(loss, MergeLoss)
    assert layer.merged
    assert not torch.equal(layer.weight, before)
    assert layer.merge() is None, "a second merge changes nothing"
    layer.unmerge()
    assert not layer.merged
    assert torch.equal(layer.weight, before)
    assert layer.weight.data_ptr() == memory, "optimizers and tied layers need the same parameter and memory"
    assert torch.equal(layer(x), y)
    layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_merged_equals_unmerged(make_bank: Callable[..., Any], kind: str, core_sharing: str) -> None:
    """The merged weight contains the update without dropout, as accurately as a plain fp32 sum of weight and update."""
    bank, sites = make_bank(kind, n_layers=2, core_sharing=core_sharing, dtype=torch.float32, dropout=0.3)
    for site in sites:
        layer = EfftLinear(nn.Linear(*bank.sizes(site)), bank, site)
        base, delta = layer.weight.double(), layer.delta_weight()
        exact = delta.double()
        layer.merge()
        assert bank.training
        peer = (layer.base_weight + delta) - layer.base_weight
        assert_close_budget((layer.weight.double() - base).float(), exact, peer)
        x = torch.randn(5, layer.in_features)
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        torch.testing.assert_close(layer(x), (x.double() @ (base + exact).t() + layer.bias).float())


@pytest.mark.parametrize(
    ("dtype", "ratio", "least", "most"),
    [
        (torch.bfloat16, 1e-3, 0.5, 1.5),  # most of the update is lost
        (torch.bfloat16, 1e-1, 0.005, 0.05),
        (torch.float16, 1e-3, 0.05, 0.5),
        (torch.float32, 1e-3, 1e-6, 1e-4),
        (torch.float64, 1e-3, 0.0, 1e-12),
    ],
    ids=str,
)
def test_what_rounding_cost(dtype: torch.dtype, ratio: float, least: float, most: float) -> None:
    layer = make(dtype, ratio)
    before, exact = layer.weight.double().clone(), layer.delta_weight().double()
    loss = layer.merge()
    assert loss.relative_update == pytest.approx(ratio, rel=1e-3)
    error = ((layer.weight.double() - before - exact).norm() / exact.norm()).item()
    assert least <= error <= most
    assert loss.relative_error == pytest.approx(error, rel=0.05, abs=1e-12)


def test_a_zero_update_costs_nothing() -> None:
    layer = EfftLinear.from_linear(nn.Linear(6, 4, dtype=torch.bfloat16), rank=2)
    before = layer.weight.clone()
    assert layer.merge() == MergeLoss(relative_update=0.0, relative_error=0.0)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_has_no_say(dtype: torch.dtype) -> None:
    plain = make(dtype)
    other = copy.deepcopy(plain)
    loss = plain.merge()
    with torch.autocast("cpu", torch.bfloat16):
        assert other.merge() == loss
    assert torch.equal(other.weight, plain.weight)


def test_the_base_weight_is_kept_but_not_saved() -> None:
    layer = make(torch.float32)
    names, base = list(layer.state_dict()), layer.weight.clone()
    layer.merge()
    assert list(layer.state_dict()) == names
    assert torch.equal(layer.base_weight, base)
    twin = copy.deepcopy(layer)
    twin.unmerge()
    assert layer.merged
    assert torch.equal(twin.weight, base)
    layer.to(torch.float64).unmerge()
    assert torch.equal(layer.weight, base.double())


def test_a_merged_layer_gives_gradients_to_its_input_only() -> None:
    layer = make(torch.float64)
    x = torch.randn(3, 48, dtype=torch.float64, requires_grad=True)
    expected: list[Tensor] = list(torch.autograd.grad(layer(x).square().sum(), x))
    layer.merge()
    y = layer(x)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], expected[0])
    assert not layer(x.detach()).requires_grad
