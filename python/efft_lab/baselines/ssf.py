"""Apply SSF: replace the output y of each linear layer, each norm and the patch embedding by y * gamma + beta.

The classifier is not scaled. Reference: Lian et al., "Scaling & Shifting Your Features: A New Baseline for Efficient
Model Tuning", NeurIPS 2022 (arXiv 2210.08823). As in the authors' code, gamma starts close to one and beta close to
zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import efft
from efft_lab.baselines.registry import baseline
from efft_lab.baselines.vit import blocks

_STD = 0.02


class ScaleShift(nn.Module):
    """Compute y * gamma + beta, with one entry of gamma and beta for each entry of the last dimension of y."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(1 + _STD * torch.randn(features))
        self.beta = nn.Parameter(_STD * torch.randn(features))

    def forward(self, y: Tensor) -> Tensor:  # [..., features] -> [..., features]
        return y * self.gamma + self.beta


@baseline("ssf")
def apply(model: nn.Module) -> nn.Module:
    """Add a scale and a shift to a ViT after the patch embedding and after every norm and linear layer, in place.

    Only gamma, beta and the classifier are trainable. The classifier itself gets no scale and no shift.
    """
    efft.freeze_backbone(model)
    each = blocks(model)
    features = each[0].attn.proj.out_features
    whole: Any = model
    sites: list[tuple[Any, int]] = [(whole.patch_embed, features), (whole.norm, features)]
    for block in each:
        sites += [(norm, features) for norm in (block.norm1, block.norm2)]
        linears = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
        sites += [(linear, linear.out_features) for linear in linears]
    for module, size in sites:
        module.ssf = ScaleShift(size)
        module.register_forward_hook(_behind)
    return model


def _behind(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    result: Tensor = module.ssf(output)
    return result
