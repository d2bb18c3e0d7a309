"""Test ``efft.prune``, which lowers the ranks of a trained adapter.

Pruning is exact if the effective rank of the factors is lower. It reports its error, and leaves a model that works.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efft
from efft.adapting.inject import adapted_layers
from efft.prune import set_ranks

Make = Callable[..., nn.Module]
Unchanged = Callable[[nn.Module], AbstractContextManager[None]]
CONFIGS: list[dict[str, Any]] = [
    {"scale": {"mhsa": 2.0, "ffn": -0.5}},
    {"trainable_scale": "matrix", "core_sharing": "shared"},
    {"variant": "efft1", "trainable_scale": "global"},
    {"targets": ["qkv", "proj", "fc2"], "exclude": [r"blocks\.0\.attn\.proj"]},  # leaves a core unused
]


def updates(model: nn.Module) -> dict[str, list[Tensor]]:
    """Return the updates [out, in] of all layers, by group."""
    found: dict[str, list[Tensor]] = {}
    for layer in adapted_layers(model).values():
        name = next(name for name, bank in model.efft.items() if bank is layer.factors)
        found.setdefault(name, []).append(layer.delta_weight())
    return found


def norm(matrices: list[Tensor]) -> float:
    return float(torch.cat([m.flatten() for m in matrices]).double().norm())


def lowered(model: nn.Module, rank: int) -> nn.Module:
    """Return the model with factors of the original size whose effective rank is ``rank``."""
    with torch.no_grad():
        for factors in model.efft.values():
            mix_in, mix_out = (torch.randn(r, rank) @ torch.randn(rank, r) for r in (factors.r1, factors.r2))
            factors.C.copy_(mix_in @ factors.C @ mix_out)
    return model


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_exact_where_the_rank_is_lower(config: dict[str, Any], adapted_vit: Make, images: Tensor) -> None:
    torch.manual_seed(0)
    model = lowered(adapted_vit(rank=(7, 6), std=0.2, dropout=0.1, **config), 3)
    before, outputs = updates(model), model(images)
    assert norm([u for us in before.values() for u in us]) > 1
    report = efft.prune(model, keep=1)
    assert set(report.ranks.values()) == {(3, 3)}
    assert max(report.relative_error.values()) < 1e-5
    for name, after in updates(model).items():
        assert norm([a - b for a, b in zip(after, before[name], strict=True)]) < 1e-5 * norm(before[name])
    torch.testing.assert_close(model(images), outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep", [0.999, 0.9, 0.5])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_error_is_what_the_dropped_singular_values_say(config: dict[str, Any], keep: float, adapted_vit: Make) -> None:
    model = adapted_vit(rank=(6, 7), std=0.2, **config).double()
    before = updates(model)
    report = efft.prune(model, keep)
    assert str(report).count("of the update lost") == len(report.ranks)
    for name, after in updates(model).items():
        lost = norm([a - b for a, b in zip(after, before[name], strict=True)])
        assert lost / norm(before[name]) == pytest.approx(report.relative_error[name], rel=1e-6)
        assert report.relative_error[name] ** 2 <= 1 - keep
        factors = model.efft[name]
        assert (factors.r1, factors.r2) == report.ranks[name] == tuple(factors.C.shape[2:])


def test_no_basis_of_that_rank_loses_less(adapted_vit: Make) -> None:
    """If only r1 is lowered, the singular values of all dense updates side by side determine the smallest error."""
    model = adapted_vit(rank=(6, 1), targets=["qkv"], std=0.2).double()
    beside = torch.cat([u.t() for u in updates(model)["mhsa"]], 1)  # [inputs, outputs of all layers]
    values = torch.linalg.svdvals(beside)[:6]
    report = efft.prune(model, keep=0.8)
    r1, r2 = report.ranks["mhsa"]
    assert r2 == 1 < r1 < 6
    assert report.relative_error["mhsa"] == pytest.approx(float(values[r1:].norm() / values.norm()))


def test_factors_stay_as_large(adapted_vit: Make) -> None:
    model = adapted_vit(rank=8, std=0.2)
    sizes = {n: p.square().mean() for n, p in efft.named_factors(model)}
    efft.prune(model, 0.7)
    for name, factor in efft.named_factors(model):
        if name[-1] in "UV":
            torch.testing.assert_close(factor.square().mean(), sizes[name])


def test_training_saving_and_loading_go_on(adapted_vit: Make, tiny_vit: Make, images: Tensor, tmp_path: Path) -> None:
    model = adapted_vit(rank=8, std=0.1, scale=0.5)
    ranks = efft.prune(model, 0.9).ranks
    assert model.efft.config.rank == ranks
    assert all(r1 < 8 or r2 < 8 for r1, r2 in ranks.values())
    optimizer = torch.optim.AdamW(efft.parameter_groups(model, lr=1e-3))
    before = [p.detach().clone() for _, p in efft.named_factors(model)]
    model.train()(images).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(old, new) for old, (_, new) in zip(before, efft.named_factors(model), strict=True))
    efft.save_adapter(model.eval(), tmp_path)
    again = efft.load_adapter(tiny_vit().eval(), tmp_path)
    assert again.efft.config.rank == ranks
    assert torch.equal(again(images), model(images))
    unmerged = model(images)
    efft.merge(model)
    torch.testing.assert_close(model(images), unmerged, rtol=1e-4, atol=1e-4)
    pool = efft.AdapterPool(tiny_vit().eval())
    pool.load("pruned", tmp_path)
    with pool.use("pruned"):
        torch.testing.assert_close(pool.model(images), unmerged, rtol=1e-4, atol=1e-4)


def test_nothing_to_prune_changes_no_bit(adapted_vit: Make, unchanged: Unchanged) -> None:
    model = adapted_vit(rank=3)
    with unchanged(model):
        report = efft.prune(model, 1.0)
    assert report.ranks == report.before == {"mhsa": (3, 3), "ffn": (3, 3)}
    assert report.relative_error == {"mhsa": 0.0, "ffn": 0.0}


def test_room_for_other_ranks(adapted_vit: Make) -> None:
    """After ``set_ranks``, a model can load the state of a pruned model, and frozen factors stay frozen."""
    model, other = adapted_vit(rank=6), adapted_vit(rank=6)
    other.efft["ffn"].U.requires_grad_(False)
    set_ranks(other, efft.prune(model, 0.8).ranks)
    other.load_state_dict(model.state_dict())
    assert other.efft.config == model.efft.config
    assert [n for n, p in efft.named_factors(other) if not p.requires_grad] == ["efft.ffn.U"]


@pytest.mark.parametrize("keep", [0, 1.1, -1, float("nan"), True, "0.9", None])
def test_shares_that_are_refused(keep: Any, adapted_vit: Make, unchanged: Unchanged) -> None:
    model = adapted_vit()
    with unchanged(model), pytest.raises(ValueError, match=r"prune: keep must be a share in \(0, 1\], got"):
        efft.prune(model, keep)


def test_models_that_are_refused(adapted_vit: Make, tiny_vit: Make, unchanged: Unchanged) -> None:
    fresh = efft.apply(tiny_vit(), efft.EfftConfig(rank=4))
    broken, merged = adapted_vit(), adapted_vit()
    with torch.no_grad():
        broken.efft["ffn"].V[0, 0] = float("nan")
    efft.merge(merged)
    other = efft.apply(tiny_vit(), efft.methods.LoRAConfig(rank=2))
    for model, message in (
        (fresh, "the update of group 'mhsa' is zero: prune it after training; nothing was pruned"),
        (broken, "the update of group 'ffn' has NaN or infinite entries; nothing was pruned"),
        (merged, r"merged into this model's weights; call efft.unmerge\(model\) before pruning it"),
        (other, "expected a model adapted by EFFT, got one of method 'lora': it has no cores"),
    ):
        with unchanged(model), pytest.raises(ValueError, match=message):
            efft.prune(model)
