"""Apply AdaptFormer: a bottleneck parallel to the MLP of every block, MLP(z) + s * Up(ReLU(Down(z))), z = LayerNorm(x).

Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", NeurIPS 2022 (arXiv
2205.13535). In a model with LayerScale, LayerScale acts on the sum. Width 8 gives the 0.16 M parameters of the VTAB-1K
tables.
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
    """Add a bottleneck parallel to the MLP of every block, in place. Only they and the classifier are trainable."""
    efft.freeze_backbone(model)
    for block in blocks(model):
        block.mlp.adaptformer = Bottleneck(block.mlp.fc1.in_features, width, nn.ReLU(), scale)
        block.mlp.register_forward_hook(_beside)
    return model


def _beside(mlp: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    result: Tensor = output + mlp.adaptformer(inputs[0])
    return result
