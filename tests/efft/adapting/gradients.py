"""Compute the gradients of a model for one batch, and compare two sets of gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return new gradients of all trainable parameters for one batch."""
    model.zero_grad()
    loss(model(x)).backward()
    return gradients(model)


def loss(y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(y.float(), torch.arange(len(y)) % y.shape[1])


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert ours.keys() == expected.keys() != set()
    for name, gradient in ours.items():
        error = (gradient - expected[name]).abs().max() / expected[name].abs().max()
        assert error <= tolerance, f"{name}: {error:.1e}"
