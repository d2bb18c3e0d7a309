"""Test that packed factors do not change any result, and test when factors are packed.

The update of a layer is D G, the product of two thin factors. Packed factors are copies of D and G in the dtype and the
layout that the kernels read (efft_kernels/_packed.py). Factors are packed only if ``EFFT_SM90_GENERATION=2`` selects
the second generation of the CUDA kernels. The default is the first generation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from efft_kernels import _packed, use_backend
from efft_kernels.backends import Backend
from efft_kernels.nn import EfftLinear, Site, TTFactors

N_LAYERS, D_IN, D_OUT = 3, 24, 40


class Model(nn.Module):
    """Stack layers of two kinds: fused layers with two cores, and transposed layers.

    Each kind has its own bank, a module that holds the factors of these layers.
    """

    def __init__(self, rank: int, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = TTFactors(D_IN, D_OUT // 2, rank, n_layers=N_LAYERS, n_cores=2, **settings)
        self.down = TTFactors(D_IN, D_OUT, rank, n_layers=N_LAYERS, **settings)
        for bank in (self.up, self.down):
            nn.init.normal_(bank.V, std=0.1)
        base = [(nn.Linear(D_IN, D_OUT), nn.Linear(D_OUT, D_IN)) for _ in range(N_LAYERS)]
        self.layers = nn.ModuleList()
        for i, (first, second) in enumerate(base):
            self.layers.append(EfftLinear.from_linear(first, self.up, Site(i, (0, 1))))
            self.layers.append(EfftLinear.from_linear(second, self.down, Site(i, transpose=True)))

    def forward(self, x: Tensor, again: bool = False) -> Tensor:
        for bank in (self.up, self.down):
            bank.prepare()
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        for bank in (self.up, self.down):
            bank.release()
        return x


def step(model: Model, again: bool = False) -> list[Tensor]:
    """Return the output and all gradients of one training step."""
    torch.manual_seed(1)
    x = torch.randn(11, D_IN).requires_grad_()
    with use_backend("eager"), torch.autocast("cpu", torch.bfloat16):
        y = model(x, again)
    model.zero_grad()
    y.float().square().sum().backward()
    return [y, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Let the eager backend use packed factors. Return a function that returns the number of packed copies so far."""
    count, copy = 0, _packed._copy

    def counted(*arguments: Any) -> Tensor:
        nonlocal count
        count += 1
        return copy(*arguments)

    monkeypatch.setenv("EFFT_SM90_GENERATION", "2")
    for name in ("efft_kernels._packed", "efft_kernels.ops.tt_linear"):
        monkeypatch.setattr(sys.modules[name], "BACKENDS", (Backend.EAGER,))
    monkeypatch.setattr(_packed, "_copy", counted)
    return lambda: count


@pytest.mark.parametrize("rank", [8, 5])
@pytest.mark.parametrize("settings", [{}, {"dropout": 0.3}, {"core_sharing": "shared"}], ids=str)
@pytest.mark.parametrize("again", [False, True], ids=["stored", "checkpointed"])
def test_outputs_and_gradients_are_exactly_equal(
    packing: Callable[[], int], monkeypatch: pytest.MonkeyPatch, rank: int, settings: dict[str, Any], again: bool
) -> None:
    packed = step(Model(rank, **settings), again)
    assert packing() == 6  # D, G and the transpose of G, for two kinds of layers
    monkeypatch.setenv("EFFT_SM90_GENERATION", "1")
    plain = step(Model(rank, **settings), again)
    assert packing() == 6
    assert len(packed) == len(plain) == 8
    assert all(torch.equal(one, other) for one, other in zip(packed, plain, strict=True))


def test_every_pass_packs_the_factors_of_that_pass(packing: Callable[[], int]) -> None:
    model = Model(8)
    first = step(model)
    with torch.no_grad():
        for bank in (model.up, model.down):
            bank.V.mul_(2)
    assert not torch.equal(first[0], step(model)[0])
    assert packing() == 12


def test_other_factors_are_not_taken_for_the_packed_ones(packing: Callable[[], int]) -> None:
    D, G = torch.randn(D_IN, 8), torch.randn(2, 8, D_OUT)
    first, second = G.unbind(0)
    _packed.attach(D, G, [first, second])
    found = _packed.find(Backend.EAGER, torch.bfloat16, D, second)
    assert found is not None
    assert torch.equal(found.D, D.bfloat16())
    assert torch.equal(found.G, G[1].bfloat16())
    assert torch.equal(found.G_rows, G[1].bfloat16())
    assert found.D.t().is_contiguous()
    assert found.G.t().is_contiguous()
    assert found.G_rows.is_contiguous()
    assert _packed.find(Backend.EAGER, torch.bfloat16, 2 * D, second) is None
    assert _packed.find(Backend.EAGER, torch.bfloat16, D, 2 * second) is None
    assert _packed.find(Backend.CPU, torch.bfloat16, D, second) is None
    D.mul_(2)
    assert _packed.find(Backend.EAGER, torch.bfloat16, D, second) is None


def test_the_first_generation_packs_nothing(packing: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EFFT_SM90_GENERATION")
    step(Model(8))
    assert packing() == 0
