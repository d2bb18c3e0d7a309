"""Find the transformer blocks of a model, and make its normalization layers trainable, for the baselines."""

from __future__ import annotations

from typing import Any

from torch import nn

from efft.planning.extras import is_norm

_PARTS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


def blocks(model: nn.Module) -> list[Any]:
    """Return the transformer blocks of a timm ViT.

    Raises:
        ValueError: the model does not have the structure of a timm ViT.
    """
    found = list(getattr(model, "blocks", ()))
    names = [{name for name, _ in block.named_modules()} for block in found]
    missing = {part for modules in names for part in _PARTS if part not in modules}
    if not found or missing:
        reason = f"whose blocks lack {', '.join(sorted(missing))}" if found else "that has no blocks"
        raise ValueError(f"this method supports only timm's ViTs, got a {type(model).__name__} {reason}")
    return found


def train_norms(model: nn.Module) -> None:
    """Make the weights and biases of all normalization layers trainable."""
    for module in model.modules():
        if is_norm(module):
            module.requires_grad_(True)
