"""Test merging and unmerging.

A merged model computes the same function, every merged weight is rounded only once, unmerging restores the weights
exactly, and the report states the rounding error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efft
from efft.methods import LoRETTAAdpConfig
from efft_kernels import EfftLinear

Make = Callable[..., nn.Module]
Unchanged = Callable[[nn.Module], AbstractContextManager[None]]
CONFIGS: list[dict[str, Any]] = [
    {},
    {"scale": 0.3, "core_sharing": "shared"},
    {"variant": "efft1", "rank": (3, 5)},
    {"rank": {"mhsa": 2, "ffn": (3, 6)}, "trainable_scale": True, "scale": {"mhsa": 2.0, "ffn": -0.5}},
    {"trainable_scale": "global", "scale": {"mhsa": 2.0, "ffn": -0.5}},
    {"trainable_scale": "matrix", "core_sharing": "shared"},
]


def dense_update(model: nn.Module, name: str) -> Tensor:
    """Return ΔW [out, in] of a layer in fp64, computed only from the factors and the layer's position."""
    layer = model.get_submodule(name)
    factors, site = layer.factors, layer.site
    U, C, V = factors.U.double(), factors.C.double(), factors.V.double()
    C = C[0 if factors.core_sharing == "shared" else site.layer]
    scales = torch.as_tensor(factors.scale, dtype=torch.float64).expand(factors.n_layers, factors.n_cores)[site.layer]
    update = torch.cat([scales[i] * U @ C[i] @ V for i in site.cores], dim=1)
    if site.columns is not None:
        update = update[:, slice(*site.columns)]
    update = update if site.transpose else update.t()
    return update.detach()


# --- the same function -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_merged_weights_are_base_plus_update_rounded_once(
    config: dict[str, Any], tiny_vit: Make, adapted_vit: Make
) -> None:
    base = tiny_vit()
    model = adapted_vit(**config)
    updates = {name: dense_update(model, name) for name in model.efft.layers}
    efft.merge(model)
    for name, update in updates.items():
        exact = base.get_submodule(name).weight.double() + update
        rounding = torch.finfo(torch.float32).eps * (exact.abs() + update.abs().max())
        error = (model.get_submodule(name).weight.double() - exact).abs()
        assert (error <= 2 * rounding).all(), name


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_merged_model_computes_the_same(config: dict[str, Any], adapted_vit: Make, images: Tensor) -> None:
    """The difference is compared with the effect of the update. Otherwise, a missing layer would not be noticed."""
    model = adapted_vit(std=0.2, **config)
    unmerged = model(images)
    with efft.disabled(model):
        effect = (unmerged - model(images)).norm()
    efft.merge(model)
    merged = model(images)
    assert ((merged - unmerged).norm() / effect).item() < 1e-4
    assert torch.equal(model.forward_head(model.forward_features(images)), merged)


def test_merging_what_is_switched_off_is_refused(adapted_vit: Make, images: Tensor) -> None:
    model = adapted_vit()
    live = model(images)
    with efft.disabled(model):
        base = model(images)
        with pytest.raises(RuntimeError, match=r"switched off by efft\.disabled; merge outside"):
            efft.merge(model)
        efft.unmerge(model)
        assert torch.equal(model(images), base)
    assert torch.equal(model(images), live)


def test_small_update_of_big_weights(tiny_vit: Make, randomize: Make) -> None:
    """The update is less than 1/10,000 of the weights. Merging must round the sum only once."""
    model = tiny_vit()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.uniform_(-10, 10)
    randomize(efft.apply(model, efft.EfftConfig(rank=4, targets=["blocks.0.mlp.fc1"])), std=0.05)
    layer = model.blocks[0].mlp.fc1
    before, update = layer.weight.detach().clone(), dense_update(model, "blocks.0.mlp.fc1")
    loss = efft.merge(model).layers["blocks.0.mlp.fc1"]
    achieved = layer.weight.double() - before.double()
    error = ((achieved - update).norm() / update.norm()).item()
    assert error < 3e-3
    assert loss.relative_error == pytest.approx(error, rel=0.05)
    assert loss.relative_update == pytest.approx((update.norm() / before.double().norm()).item(), rel=1e-4)
    assert loss.relative_update < 1e-4


def test_swin(tiny_swin: Make, randomize: Make) -> None:
    model, x = tiny_swin().double().eval(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    randomize(efft.apply(model, efft.EfftConfig(rank={"mhsa": 3, "ffn": (2, 4)}, core_sharing="shared")), std=0.2)
    unmerged = model(x)
    efft.merge(model)
    torch.testing.assert_close(model(x), unmerged, rtol=1e-9, atol=1e-9)


def test_merging_leaves_dropout_out(adapted_vit: Make, images: Tensor) -> None:
    model = adapted_vit(dropout=0.5)
    unmerged = model(images)
    model.train()
    efft.merge(model)
    assert all(factors.training for factors in model.efft.values()), (
        "merge must restore the training mode of the factors"
    )
    torch.testing.assert_close(model(images), unmerged, rtol=1e-4, atol=1e-4)


# --- unmerging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_unmerge_is_exact(dtype: torch.dtype, tiny_vit: Make, randomize: Make, unchanged: Unchanged) -> None:
    model = randomize(efft.apply(tiny_vit().to(dtype), efft.EfftConfig(rank=4)))
    with unchanged(model):
        efft.merge(model)
        assert all(layer.merged for layer in model.modules() if isinstance(layer, EfftLinear))
        efft.unmerge(model)
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, EfftLinear))


def test_unmerged_model_trains_again(adapted_vit: Make, images: Tensor) -> None:
    model = adapted_vit(dropout=0.0)
    before = model(images)
    efft.merge(model)
    efft.unmerge(model)
    after = model(images)
    assert torch.equal(after, before)
    after.sum().backward()
    assert all(p.grad is not None and p.grad.any() for _, p in efft.named_factors(model))


def test_merge_and_unmerge_are_idempotent(adapted_vit: Make, unchanged: Unchanged) -> None:
    model = adapted_vit()
    with unchanged(model):
        efft.unmerge(model)
        efft.merge(model)
        with unchanged(model):
            report = efft.merge(model)
        assert (report.layers, report.worst) == ({}, None)
        assert str(report) == "nothing to merge: all layers were merged already"
        efft.unmerge(model)
        efft.unmerge(model)


@pytest.mark.parametrize("plain", [False, True])
def test_a_merged_state_is_not_loaded_into_a_model_that_would_add_the_update_again(
    plain: bool, adapted_vit: Make, tiny_vit: Make, images: Tensor
) -> None:
    """``plain``: the state dict has lost its metadata, as in a file of safetensors."""
    source = adapted_vit().eval()
    efft.merge(source)
    expected, state = source(images), source.state_dict()
    state = dict(state) if plain else state
    model = efft.apply(tiny_vit().eval(), source.efft.config)
    with pytest.raises(ValueError, match="is that of a model whose update was merged"):
        model.load_state_dict(state)
    source.load_state_dict(state)
    assert torch.equal(source(images), expected)


@pytest.mark.parametrize("config", [efft.EfftConfig(rank=4), LoRETTAAdpConfig(rank=2)], ids=["efft", "adapter"])
def test_the_state_of_another_base_is_loaded(config: Any, tiny_vit: Make, randomize: Make, images: Tensor) -> None:
    source = randomize(efft.apply(tiny_vit().eval(), config), 0.3)
    other = tiny_vit().eval()
    for parameter in other.parameters():
        parameter.data.mul_(0.9)
    efft.apply(other, config)
    other.load_state_dict(source.state_dict())
    assert torch.equal(other(images), source(images))


def test_a_merged_model_does_not_load_other_weights_or_factors(
    adapted_vit: Make, images: Tensor, unchanged: Unchanged
) -> None:
    model = adapted_vit().eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    factors = {name: 2 * tensor for name, tensor in state.items() if name.startswith("efft.")}
    before = model(images)
    efft.merge(model)
    for other in (state, factors):
        with unchanged(model), pytest.raises(ValueError, match=r"call efft.unmerge\(model\) before loading"):
            model.load_state_dict(other, strict=False)
    efft.unmerge(model)
    model.load_state_dict(state)
    assert torch.equal(model(images), before)


def test_remove_from_a_merged_model(tiny_vit: Make, randomize: Make, unchanged: Unchanged) -> None:
    model = tiny_vit().eval()
    with unchanged(model):
        efft.merge(randomize(efft.apply(model, efft.EfftConfig(rank=4))))
        efft.remove(model)


def test_merged_model_can_change_its_dtype(adapted_vit: Make, tiny_vit: Make) -> None:
    model = adapted_vit()
    efft.merge(model)
    model.double()
    efft.unmerge(model)
    assert torch.equal(model.blocks[0].attn.qkv.weight, tiny_vit().blocks[0].attn.qkv.weight.double())


# --- report ----------------------------------------------------------------------------------------------------------


def test_report_of_fp32_weights(adapted_vit: Make) -> None:
    model = adapted_vit()
    report = efft.merge(model)
    assert list(report.layers) == model.efft.layers
    name, loss = report.worst
    assert loss.relative_error == max(m.relative_error for m in report.layers.values()) < 1e-5
    mean = sum(m.relative_update for m in report.layers.values()) / 8
    assert str(report) == (
        f"merged 8 layers: mean |dW|/|W| = {mean:.2e}; largest part of an update lost to rounding: "
        f"{loss.relative_error:.1e} ({name})"
    )


def test_report_of_bf16_weights_advises(tiny_vit: Make, randomize: Make) -> None:
    model = randomize(efft.apply(tiny_vit().to(torch.bfloat16), efft.EfftConfig(rank=4)), std=0.02)
    report = efft.merge(model)
    name, loss = report.worst
    assert loss.relative_error > 0.5, "bf16 weights must lose most of a tiny update"
    assert str(report).endswith(
        f"lost to rounding: {loss.relative_error:.1e} ({name}); the weights are too coarse for this update: merge into "
        f"float32 weights (model.float())"
    )
    efft.unmerge(model)
    assert efft.merge(model.float()).worst[1].relative_error < 1e-2


def test_report_of_a_fresh_adapter(tiny_vit: Make, unchanged: Unchanged) -> None:
    model = efft.apply(tiny_vit(), efft.EfftConfig(rank=4))
    with unchanged(model):
        report = efft.merge(model)
        assert {(m.relative_update, m.relative_error) for m in report.layers.values()} == {(0.0, 0.0)}
        efft.unmerge(model)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("factor", ["efft.mhsa.U", "efft.ffn.C", "efft.ffn.V", "efft.mhsa.log_scale"])
def test_nonfinite_factors_change_nothing(factor: str, value: float, adapted_vit: Make, unchanged: Unchanged) -> None:
    model = adapted_vit(trainable_scale=True)
    with torch.no_grad():
        model.get_parameter(factor).view(-1)[-1] = value
    message = f"factor {factor!r} has NaN or infinite entries; nothing was merged"
    with unchanged(model), pytest.raises(ValueError, match=re.escape(message)):
        efft.merge(model)


def test_overflowing_update_changes_nothing(adapted_vit: Make, unchanged: Unchanged) -> None:
    model = adapted_vit()
    with torch.no_grad():
        for _, factor in efft.named_factors(model):
            factor.fill_(1e20)
    with unchanged(model), pytest.raises(ValueError, match="nothing was merged"):
        efft.merge(model)


def test_plain_models(tiny_vit: Make) -> None:
    for act in (efft.merge, efft.unmerge, efft.merged_state_dict):
        with pytest.raises(ValueError, match=r"this VisionTransformer is not adapted: call efft\.apply"):
            act(tiny_vit())


# --- state dict for the plain architecture ---------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_merged_state_dict_fits_the_plain_architecture(
    merged: bool, adapted_vit: Make, tiny_vit: Make, images: Tensor, unchanged: Unchanged
) -> None:
    model = adapted_vit(std=0.2)
    if merged:
        efft.merge(model)
    with unchanged(model):
        state = efft.merged_state_dict(model)
    assert list(state) == list(tiny_vit().state_dict())
    shared = {t.data_ptr() for t in model.state_dict().values()}
    assert not shared & {t.data_ptr() for t in state.values()}, "the state dict must not share memory with the model"
    plain = tiny_vit().eval()
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(images), model(images), rtol=1e-4, atol=1e-5)


def test_merged_state_dict_in_another_dtype(adapted_vit: Make) -> None:
    model = adapted_vit()
    exact, narrow = efft.merged_state_dict(model), efft.merged_state_dict(model, torch.bfloat16)
    assert {t.dtype for t in narrow.values()} == {torch.bfloat16}
    assert all(torch.equal(narrow[n], t.bfloat16()) for n, t in exact.items()), (
        "the sum must be rounded once, at the end"
    )


def test_merged_state_dict_of_a_bf16_base_in_fp32_keeps_the_update(tiny_vit: Make, randomize: Make) -> None:
    model = randomize(efft.apply(tiny_vit().to(torch.bfloat16), efft.EfftConfig(rank=4)), std=0.05)
    name = "blocks.1.mlp.fc2"
    exact = model.get_submodule(name).weight.double() + dense_update(model, name)
    state = efft.merged_state_dict(model, torch.float32)
    torch.testing.assert_close(state[f"{name}.weight"].double(), exact, rtol=1e-6, atol=1e-9)


def test_merged_state_dict_of_a_merged_bf16_model_in_fp32(tiny_vit: Make, randomize: Make) -> None:
    model = randomize(efft.apply(tiny_vit().to(torch.bfloat16), efft.EfftConfig(rank=4)), std=0.05)
    unmerged = efft.merged_state_dict(model, torch.float32)
    efft.merge(model)
    merged = efft.merged_state_dict(model, torch.float32)
    torch.testing.assert_close(merged, unmerged, rtol=1e-6, atol=1e-8)
