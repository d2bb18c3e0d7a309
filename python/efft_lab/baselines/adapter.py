"""Apply adapters: replace the output h of the MLP of every block by h + Up(GELU(Down(h))).

Down and Up are trained linear layers that reduce and restore the width. :class:`Bottleneck` is also used by
AdaptFormer.

Reference: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019 (arXiv 1902.00751). Here, each
block has one adapter, after the MLP, as in Pfeiffer et al. (arXiv 2005.00247) and in the VTAB-1K tables of NOAH. With
width 8, the adapters of a ViT-B have the 0.16 M parameters of these tables.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import efft
from efft_lab.baselines.registry import baseline
from efft_lab.baselines.vit import blocks


class Bottleneck(nn.Module):
    """Compute scale * Up(activation(Down(h))), which is zero at initialization.

    Args:
        features: width of input and output.
        width: width of the bottleneck.
        activation: module between the two linear layers.
        scale: constant factor of the output.
    """

    def __init__(self, features: int, width: int, activation: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.down, self.activation = nn.Linear(features, width), activation
        self.up, self.scale = nn.Linear(width, features), scale
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, h: Tensor) -> Tensor:  # [..., features] -> [..., features]
        result: Tensor = self.up(self.activation(self.down(h)))
        return self.scale * result


@baseline("adapter")
def apply(model: nn.Module, width: int = 8) -> nn.Module:
    """Add an adapter after the MLP of every block, in place. Only the adapters and the classifier are trainable."""
    efft.freeze_backbone(model)
    for block in blocks(model):
        block.mlp.adapter = Bottleneck(block.mlp.fc2.out_features, width, nn.GELU())
        block.mlp.register_forward_hook(_behind)
    return model


def _behind(mlp: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    result: Tensor = output + mlp.adapter(output)
    return result
