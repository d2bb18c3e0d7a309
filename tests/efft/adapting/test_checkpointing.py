"""Test activation checkpointing, where the backward pass runs layers a second time.

The second run must use the same factors and the same factor dropout as the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import efft
from tests.efft.adapting.gradients import assert_same, gradients, loss, step

Make = Callable[..., nn.Module]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("architecture", ["vit", "swin"])
def test_gradient_checkpointing_equals_plain(
    architecture: str, dropout: float, tiny_vit: Make, tiny_swin: Make, randomize: Make
) -> None:
    side, model = (
        (16, tiny_vit()) if architecture == "vit" else (32, tiny_swin(patch_size=4, depths=(2, 2), num_heads=(1, 2)))
    )
    randomize(efft.apply(model, efft.EfftConfig(rank=2, dropout=dropout)), std=0.2).train()
    x = torch.randn(2, 3, side, side)
    torch.manual_seed(4)
    expected = step(model, x)
    model.set_grad_checkpointing()
    for _ in range(3):  # state that one pass leaves behind would disturb the next
        torch.manual_seed(4)
        assert_same(step(model, x), expected)


def test_gradient_checkpointing_of_transformers(randomize: Make) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'efft-kernels[hf]'")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    model = transformers.ViTForImageClassification(config).train()
    randomize(efft.apply(model, efft.EfftConfig(rank=2, targets=["q_proj", "fc1", "fc2"], dropout=0.3)))
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    x = torch.randn(3, 3, 16, 16)
    results = []
    for _ in range(2):
        torch.manual_seed(4)
        model.zero_grad()
        model(pixel_values=x).logits.square().sum().backward()
        results.append(gradients(model))
        enable()
    assert_same(results[1], results[0])


def test_whole_model_in_a_checkpoint(adapted_vit: Make, images: Tensor) -> None:
    model = adapted_vit(std=0.2, dropout=0.3).train()
    torch.manual_seed(4)
    expected = step(model, images)
    for _ in range(2):
        torch.manual_seed(4)
        model.zero_grad()
        loss(checkpoint(model, images, use_reentrant=False)).backward()
        assert_same(gradients(model), expected)


def test_reentrant_checkpointing(adapted_vit: Make, images: Tensor) -> None:
    """Reentrant checkpointing is correct without factor dropout, and raises an error with factor dropout."""
    for dropout in (0.0, 0.3):
        model = adapted_vit(std=0.2, dropout=dropout).train()
        expected = step(model, images)
        blocks = model.blocks.forward
        model.blocks.forward = lambda x, blocks=blocks: checkpoint(blocks, x, use_reentrant=True)
        again = images.clone().requires_grad_()
        if dropout:
            with pytest.raises(RuntimeError, match=r"use_reentrant=True cannot repeat.*use_reentrant=False"):
                model(again).sum().backward()
        else:
            assert_same(step(model, again), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_two_checkpointed_passes_before_one_backward(dropout: float, adapted_vit: Make, images: Tensor) -> None:
    model = adapted_vit(std=0.2, dropout=dropout).train()
    results = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.manual_seed(4)
        (loss(model(images)) + loss(model(images.flip(-1)))).backward()
        results.append(gradients(model))
    assert_same(results[1], results[0])


def test_checkpointed_evaluation_in_between(adapted_vit: Make, images: Tensor) -> None:
    model = adapted_vit(std=0.2, dropout=0.3).train()
    model.set_grad_checkpointing()
    torch.manual_seed(4)
    expected = step(model, images)
    with torch.no_grad():
        model.eval()(images)
    torch.manual_seed(4)
    assert_same(step(model.train(), images), expected)


@pytest.mark.parametrize("then", ["forward", "forward_features"])
def test_a_pass_whose_loss_was_thrown_away_does_not_disturb_the_next(
    then: str, adapted_vit: Make, images: Tensor
) -> None:
    """This is how a training loop skips a step whose loss is not finite."""
    model = adapted_vit(std=0.2, dropout=0.3).train()
    results = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        skipped = loss(model(images))
        del skipped
        model.zero_grad()
        torch.manual_seed(4)
        getattr(model, then)(images).square().sum().backward()
        results.append(gradients(model))
    assert_same(results[1], results[0])


def test_parts_called_alone_after_a_step(adapted_vit: Make, images: Tensor) -> None:
    """``forward_features`` and ``forward_head`` must use the current factors rather than those of an earlier pass."""
    model = adapted_vit(std=0.2, dropout=0.0).train()
    results = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        kept = loss(model(images))
        kept.backward()
        before = {n: p.detach().clone() for n, p in efft.named_factors(model)}
        with torch.no_grad():
            for _, factor in efft.named_factors(model):
                factor.add_(0.1)
        model.zero_grad()
        loss(model.forward_head(model.forward_features(images))).backward()
        results.append(gradients(model))
        with torch.no_grad():
            for n, factor in efft.named_factors(model):
                factor.copy_(before[n])
    assert_same(results[1], results[0])


def test_checkpointed_parts_called_alone(adapted_vit: Make, images: Tensor) -> None:
    model = adapted_vit(std=0.2, dropout=0.3).train()
    results = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.manual_seed(4)
        loss(model.forward_head(model.forward_features(images))).backward()
        results.append(gradients(model))
    assert_same(results[1], results[0])
