"""Test tiny random transformers of diffusers, whose layers are found by structure.

The models are trained for two steps, saved, loaded, merged and restored. Another test covers gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efft

pytestmark = pytest.mark.slow  # trains models of diffusers

diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install 'efft-kernels[dev]'")


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def dit() -> tuple[nn.Module, dict[str, Any]]:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2}
    model = diffusers.DiTTransformer2DModel(**sizes, sample_size=8, patch_size=2, num_embeds_ada_norm=10)
    inputs = {"hidden_states": noise(2, 4, 8, 8), "class_labels": torch.tensor([0, 1])}
    return model, {**inputs, "timestep": torch.tensor([1, 2])}


def sd3() -> tuple[nn.Module, dict[str, Any]]:
    sizes = {"sample_size": 8, "patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    sizes |= {"attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32}
    model = diffusers.SD3Transformer2DModel(**sizes, joint_attention_dim=32, pooled_projection_dim=64)
    inputs = {"hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 5, 32)}
    return model, {**inputs, "pooled_projections": noise(2, 64), "timestep": torch.tensor([1, 2])}


def flux() -> tuple[nn.Module, dict[str, Any]]:
    sizes = {"patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16}
    sizes |= {"num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32}
    model = diffusers.FluxTransformer2DModel(**sizes, axes_dims_rope=[4, 4, 8])
    inputs = {"hidden_states": noise(2, 16, 4), "encoder_hidden_states": noise(2, 5, 32)}
    places = {"img_ids": torch.arange(48.0).view(16, 3), "txt_ids": torch.zeros(5, 3)}
    return model, {**inputs, **places, "pooled_projections": noise(2, 32), "timestep": torch.tensor([1.0, 2.0])}


@pytest.fixture(params=[dit, sd3, flux], ids=lambda make: make.__name__)
def make(request: pytest.FixtureRequest) -> Callable[[], tuple[nn.Module, dict[str, Any]]]:
    """Return a function that creates the same model with the same inputs in every call."""

    def build() -> tuple[nn.Module, dict[str, Any]]:
        torch.manual_seed(0)
        return request.param()

    return build


def weights_of_blocks(model: nn.Module) -> int:
    return sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "transformer_blocks." in name
    )


def test_trained_saved_and_merged(make: Any, tmp_path: Path) -> None:
    model, inputs = make()
    model.eval()
    before, expected = model(**inputs).sample.detach(), weights_of_blocks(model)
    efft.apply(model, efft.EfftConfig(rank=4, dropout=0.0, head=[]))
    reached = sum(layer.delta_weight().numel() for layer in efft.adapted_layers(model).values())
    assert reached == expected
    torch.testing.assert_close(model(**inputs).sample, before, rtol=0, atol=0)

    optimizer = torch.optim.AdamW(efft.parameter_groups(model, lr=1e-2))
    for _ in range(2):  # in the first step, U or V is zero, so the other factors have zero gradients
        optimizer.zero_grad()
        model(**inputs).sample.square().mean().backward()
        optimizer.step()
    assert all(factor.grad.abs().sum() > 0 for _, factor in efft.named_factors(model) if factor.grad is not None)
    assert all(factor.grad is not None for _, factor in efft.named_factors(model))
    with torch.no_grad():
        live = model(**inputs).sample
        assert (live - before).abs().max() > 1e-3

        efft.save_adapter(model, tmp_path)
        again = efft.load_adapter(make()[0].eval(), tmp_path)
        torch.testing.assert_close(again(**inputs).sample, live, rtol=0, atol=0)
        efft.merge(again)
        torch.testing.assert_close(again(**inputs).sample, live, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(efft.remove(model)(**inputs).sample, before, rtol=0, atol=0)


def test_gradient_checkpointing(make: Any) -> None:
    grads = []
    for checkpointing in (False, True):
        model, inputs = make()
        efft.apply(model, efft.EfftConfig(rank=4, dropout=0.0, head=[]))
        torch.manual_seed(3)
        for _, factor in efft.named_factors(model):
            nn.init.normal_(factor, std=0.1)
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()(**inputs).sample.square().mean().backward()
        grads.append([factor.grad for _, factor in efft.named_factors(model)])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain)
