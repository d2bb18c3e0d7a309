"""Test a bank (a module that holds factors) that a user writes as a subclass of ``FactorBank``.

The tests cover the methods that the subclass must define and the methods of the base class.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from efft_kernels import EfftLinear, FactorBank


class Pair(FactorBank):
    """Compute ``ΔW = A B[site]`` for layers with 6 inputs and 4 outputs, and record the calls of ``compose``."""

    def __init__(self) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(3, 2, 4))
        self.calls: list[list[int]] = []

    def sizes(self, site: int) -> tuple[int, int]:
        return 6, 4

    def compose(self, sites: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        self.calls.append(list(sites))
        return [(self.A @ torch.eye(2), self.B[i]) for i in sites]


@pytest.fixture
def layers() -> tuple[Pair, list[EfftLinear]]:
    torch.manual_seed(0)
    bank = Pair()
    return bank, [EfftLinear(nn.Linear(6, 4), bank, i) for i in range(3)]


def test_a_layer_uses_its_part(layers: tuple[Pair, list[EfftLinear]]) -> None:
    bank, (_, second, _) = layers
    x = torch.randn(5, 6)
    expected = nn.functional.linear(x, second.weight, second.bias) + x @ bank.A @ bank.B[1]
    torch.testing.assert_close(second(x), expected)
    torch.testing.assert_close(second.delta_weight(), (bank.A @ bank.B[1]).t())


def test_a_pass_composes_once(layers: tuple[Pair, list[EfftLinear]]) -> None:
    bank, each = layers
    x = torch.randn(5, 6)
    bank.prepare()
    outputs = [layer(x) for layer in each[:2]]
    assert [binding.site for binding in bank.release()] == [2]
    assert bank.calls == [[0, 1, 2]]
    torch.testing.assert_close(outputs, [layer(x) for layer in each[:2]])


def test_a_layer_that_runs_again_gets_the_operands_of_its_pass(layers: tuple[Pair, list[EfftLinear]]) -> None:
    bank, (layer, *_) = layers
    x = torch.randn(5, 6)
    expected = torch.autograd.grad(layer(x).square().sum(), [bank.A, bank.B])
    bank.calls.clear()
    bank.prepare()
    y = checkpoint(layer, x, use_reentrant=False)
    bank.release()
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), [bank.A, bank.B]), expected)
    assert bank.calls == [[0, 1, 2]]


def test_autocast_does_not_reach_the_factors(layers: tuple[Pair, list[EfftLinear]]) -> None:
    bank, (layer, *_) = layers
    with torch.autocast("cpu", torch.bfloat16):
        D, G = bank.down_up(layer.binding)
        bank.prepare()
        prepared = bank.down_up(layer.binding)
        bank.release()
    assert {t.dtype for t in (D, G, *prepared)} == {torch.float32}


def test_a_layer_says_what_it_uses(layers: tuple[Pair, list[EfftLinear]]) -> None:
    assert "bias=True, Pair, site=1" in repr(layers[1][1])


def test_sizes_must_fit(layers: tuple[Pair, list[EfftLinear]]) -> None:
    with pytest.raises(ValueError, match=r"1 of this bank fits a linear layer with .* = \(6, 4\), got \(6, 5\)"):
        EfftLinear(nn.Linear(6, 5), layers[0], 1)


def test_half_a_bank_is_none() -> None:
    class Half(FactorBank):
        def sizes(self, site: int) -> tuple[int, int]:
            return 6, 4

    with pytest.raises(TypeError, match=r"abstract method '?compose"):
        Half()


def test_a_site_that_is_zero_and_one_that_is_missing() -> None:
    layer = EfftLinear.from_linear(nn.Linear(6, 4), Pair(), 0)
    assert layer.site == 0
    layer(torch.randn(2, 6))
    with pytest.raises(ValueError, match="site must say which part of this Pair the layer uses, got None"):
        EfftLinear.from_linear(nn.Linear(6, 4), Pair())
