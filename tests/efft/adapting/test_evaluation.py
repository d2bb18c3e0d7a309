"""Test repeated evaluations of an adapted model.

They multiply the factors into the two matrices of each layer only once (``TTFactors.compose``). After a change of the
adapter, they must use new matrices.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efft
from efft.adapting.inject import adapter_of
from efft_kernels import TTFactors

Make = Callable[..., nn.Module]


def evaluated(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(images).clone()


def expected(model: nn.Module, images: Tensor) -> Tensor:
    """Return the output of a pass with an autograd graph, because such a pass always composes the factors again."""
    with torch.enable_grad():
        y: Tensor = copy.deepcopy(model)(images)
    return y.detach()


@pytest.mark.parametrize("variant", ["efft1", "efft2"])
def test_evaluations_compose_once(
    adapted_vit: Make, images: Tensor, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted_vit(variant=variant)
    calls: list[TTFactors] = []
    compose = TTFactors.compose
    monkeypatch.setattr(TTFactors, "compose", lambda self, sites: (calls.append(self), compose(self, sites))[1])
    for _ in range(3):
        evaluated(model, images)
    assert len(calls) == len(adapter_of(model).banks())


def _step(model: nn.Module, images: Tensor) -> None:
    optimizer = torch.optim.AdamW(efft.parameter_groups(model, lr=0.05))
    model(images).square().sum().backward()
    optimizer.step()


def _merge_and_back(model: nn.Module, images: Tensor) -> None:
    efft.merge(model)
    evaluated(model, images)
    efft.unmerge(model)
    _in_place(model, images)


def _disabled(model: nn.Module, images: Tensor) -> None:
    with efft.disabled(model):
        evaluated(model, images)
        _in_place(model, images)


def _in_place(model: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        for _, factor in efft.named_factors(model):
            factor.mul_(1.5)


def _averaged(model: nn.Module, images: Tensor) -> None:
    """Write averaged factors through ``.data``, as some libraries do. This does not change the versions of tensors."""
    for _, factor in efft.named_factors(model):
        factor.data.copy_(factor.data * 0.5)


def _unregistered(model: nn.Module, images: Tensor) -> None:
    """Replace a factor by a tensor that is not a parameter, as for forward-mode differentiation, and change it."""
    bank: Any = model.efft["mhsa"]
    value = bank.V.detach()
    for factor in (1.0, 2.0):
        del bank.V
        bank.V = factor * value
        evaluated(model, images)


CHANGES: dict[str, Callable[[nn.Module, Tensor], None]] = {
    "step": _step,
    "merged and unmerged": _merge_and_back,
    "disabled": _disabled,
    "in place": _in_place,
    "averaged": _averaged,
    "not a parameter": _unregistered,
    "to float64 and back": lambda model, images: (model.double(), _in_place(model, images), model.float())[0],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("settings", [{}, {"trainable_scale": True}, {"layer_scale": "both"}], ids=str)
def test_changes_are_seen(
    adapted_vit: Make, images: Tensor, change: Callable[[nn.Module, Tensor], None], settings: dict[str, Any]
) -> None:
    model = adapted_vit(0.3, dropout=0.0, **settings)
    before = evaluated(model, images)
    change(model, images)
    after = expected(model, images)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(evaluated(model, images), after)


def test_another_adapter_is_seen(adapter: Make, images: Tensor, tmp_path: Path) -> None:
    model, other = adapter(1), adapter(2)
    efft.save_adapter(other, tmp_path / "other")
    evaluated(model, images)
    efft.load_adapter(efft.remove(model), tmp_path / "other")
    torch.testing.assert_close(evaluated(model, images), expected(other, images))


def test_two_models_with_one_base_do_not_mix(adapter: Make, images: Tensor) -> None:
    one, other = adapter(1), adapter(2)
    results = [evaluated(model, images) for model in (one, other, one, other)]
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])
    assert not torch.allclose(results[0], results[1])
