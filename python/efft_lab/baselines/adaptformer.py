"""Apply AdaptFormer: replace MLP(z) in every block by MLP(z) + s * Up(ReLU(Down(z))), where z = LayerNorm(x).

Down and Up are trained linear layers that reduce and restore the width, and s is a constant.

Reference: Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", NeurIPS 2022 (arXiv
2205.13535). In a model with LayerScale, LayerScale multiplies the sum. With width 8, the new layers of a ViT-B have the
0.16 M parameters that published VTAB-1K tables state for this method.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import efft
from efft_lab.baselines.adapter import Bottleneck
from efft_lab.baselines.registry import baseline
from efft_lab.baselines.vit import blocks


@baseline("adaptformer")
def apply(model: nn.Module, width: int = 8, scale: float = 0.1) -> nn.Module:
    """Add a bottleneck parallel to the MLP of every block, in place.

    Only the bottlenecks and the classifier are trainable.

    Args:
        model: a timm ViT.
        width: width of each bottleneck.
        scale: constant factor s of the output of each bottleneck.
    """
    efft.freeze_backbone(model)
    for block in blocks(model):
        block.mlp.adaptformer = Bottleneck(block.mlp.fc1.in_features, width, nn.ReLU(), scale)
        block.mlp.register_forward_hook(_beside)
    return model


def _beside(mlp: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    result: Tensor = output + mlp.adaptformer(inputs[0])
    return result
