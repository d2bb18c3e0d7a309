"""Test ``layer_scale``, which multiplies the inputs and the outputs of each update by trained vectors a and b.

The vectors are called diagonals, because the update of a weight becomes diag(b) ΔW diag(a).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import efft
from efft.adapting.inject import adapted_layers

Make = Callable[..., nn.Module]

SIDES = ["in", "out", "both"]


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("variant", ["efft1", "efft2"])
def test_counts_by_formula(sides: str, variant: str, tiny_vit: Make) -> None:
    """Each of the 8 layers has a diagonal with one entry per input, a diagonal with one entry per output, or both.

    With efft1, qkv and proj use some columns of a tensor train of width 64, and their output diagonals have length 64.
    """
    config = efft.EfftConfig(rank=4, variant=variant)
    without = efft.count_parameters(efft.apply(tiny_vit(), config)).factors
    config = efft.EfftConfig(rank=4, variant=variant, layer_scale=sides)
    model = efft.apply(tiny_vit(), config)
    layers = adapted_layers(model).values()
    outputs = sum(m.out_features for m in layers) if variant == "efft2" else 2 * (3 * 64 + 16)
    own = {"in": sum(m.in_features for m in layers), "out": outputs}
    expected = sum(own.values()) if sides == "both" else own[sides]
    count = efft.count_parameters(model)
    assert count.factors == without + expected
    plan = efft.inspect(tiny_vit(), config)
    assert plan.n_parameters == count.factors
    assert "diagonal" in str(plan)


@pytest.mark.parametrize("sides", SIDES)
def test_first_step_is_a_no_op(sides: str, tiny_vit: Make, images: Tensor) -> None:
    model = tiny_vit().eval()
    before = model(images)
    assert torch.equal(efft.apply(model, efft.EfftConfig(rank=4, layer_scale=sides))(images), before)


@pytest.mark.parametrize("variant", ["efft1", "efft2"])
def test_the_update_is_that_of_the_formula(variant: str, adapted_vit: Make) -> None:
    """The oracle scales the inputs of the update without diagonals by a, and the outputs by b."""
    config = {"variant": variant, "scale": 0.7}
    model = adapted_vit(layer_scale="both", **config).double()
    plain = adapted_vit(**config).double()
    state = {name: t for name, t in model.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict(state)
    for name, layer in adapted_layers(model).items():
        a, b = layer.factors.diagonals(layer.site)
        expected = b[:, None] * adapted_layers(plain)[name].delta_weight() * a[None]
        torch.testing.assert_close(layer.delta_weight(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sides", SIDES)
def test_gradients_are_those_of_the_dense_model(sides: str, adapted_vit: Make, tiny_vit: Make, images: Tensor) -> None:
    """The oracle is a finite difference of the merged model's loss, if all diagonals change in a random direction."""
    model = adapted_vit(std=0.3, layer_scale=sides, dropout=0.0).double()
    diagonals = {n: p for n, p in efft.named_factors(model) if n.rpartition(".")[2] in ("a", "b")}
    assert diagonals
    model(images.double()).square().sum().backward()
    directions = {n: torch.randn(p.shape, dtype=p.dtype) for n, p in diagonals.items()}
    slope = sum((diagonals[n].grad * d).sum() for n, d in directions.items())
    dense, values = tiny_vit().double().eval(), []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            for n, d in directions.items():
                diagonals[n].add_(d, alpha=step)
            dense.load_state_dict(efft.merged_state_dict(model))
            values.append(dense(images.double()).square().sum())
            for n, d in directions.items():
                diagonals[n].add_(d, alpha=-step)
    torch.testing.assert_close(slope, (values[0] - values[1]) / 2e-5, rtol=1e-6, atol=1e-8)


def test_merged_saved_exported_and_pooled(
    adapted_vit: Make, tiny_vit: Make, images: Tensor, tmp_path: Path, graph_breaks: Callable[..., int]
) -> None:
    model = adapted_vit(std=0.3, layer_scale="both", bias="all")
    expected = model(images)
    loaded = efft.load_adapter(tiny_vit().eval(), efft.save_adapter(model, tmp_path / "a"))
    assert torch.equal(loaded(images), expected)
    again = efft.import_lora(tiny_vit().eval(), efft.export_lora(model, tmp_path / "lora"))
    torch.testing.assert_close(again(images), expected, rtol=1e-4, atol=1e-5)
    pool = efft.AdapterPool(tiny_vit().eval())
    pool.load("a", tmp_path / "a")
    with pool.use("a"):
        torch.testing.assert_close(pool.model(images), expected, rtol=1e-4, atol=1e-5)
    assert graph_breaks(model, images) == 0
    efft.merge(model)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    efft.unmerge(model)
    assert torch.equal(model(images), expected)


def test_they_are_a_kind_of_the_optimizer(tiny_vit: Make) -> None:
    model = efft.apply(tiny_vit(), efft.EfftConfig(rank=4, layer_scale="in"))
    groups = {g["name"]: g for g in efft.parameter_groups(model, 1e-3, rates={"diagonals": 10})}
    assert (groups["diagonals"]["lr"], groups["diagonals"]["weight_decay"]) == (1e-2, 0.0)
    assert sum(p.numel() for p in groups["diagonals"]["params"]) == 2 * (3 * 16 + 64)


def test_what_is_refused(adapted_vit: Make) -> None:
    with pytest.raises(ValueError, match=r"EfftConfig.layer_scale must be None or one of \('in', 'out', 'both'\)"):
        efft.EfftConfig(layer_scale="left")
    with pytest.raises(ValueError, match="the weights have diagonals of their own"):
        efft.prune(adapted_vit(layer_scale="in"))
