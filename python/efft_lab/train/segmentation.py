"""Turn a timm model into a model that predicts one class per pixel."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional


class Segmenter(nn.Module):
    """Apply a linear layer to every position of a backbone's last feature map, and enlarge the result bilinearly.

    Args:
        backbone: a timm model with ``forward_features`` and ``num_features``. Its features may have three forms: tokens
            [batch, tokens, channels] with class and register tokens first (as in a ViT), a map [batch, height, width,
            channels] (as in Swin), or a map [batch, channels, height, width] (as in a convolutional network).
        classes: number of outputs per pixel.

    Raises:
        ValueError: the backbone lacks ``forward_features`` or ``num_features``. In the forward pass, the same error is
            raised if the features have another form.
    """

    def __init__(self, backbone: nn.Module, classes: int) -> None:
        super().__init__()
        self.backbone: Any = backbone
        width = getattr(backbone, "num_features", None)
        if not (hasattr(backbone, "forward_features") and isinstance(width, int)):
            raise ValueError(
                "segmentation needs a model of timm, with forward_features and num_features, got a "
                f"{type(backbone).__name__} without them"
            )
        self.head = nn.Conv2d(width, classes, 1)

    def get_classifier(self) -> nn.Conv2d:
        """Return the head. timm's models use the same method name."""
        return self.head

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits [batch, classes, height, width] from images [batch, 3, height, width]."""
        logits = self.head(self._map(self.backbone.forward_features(images)))
        return functional.interpolate(logits, images.shape[-2:], mode="bilinear")

    def _map(self, features: Tensor) -> Tensor:
        """Rearrange features in one of the three forms to [batch, channels, rows, columns]."""
        width = self.head.in_channels
        if features.ndim == 4 and (features.shape[1] != width or getattr(self.backbone, "output_fmt", "") == "NHWC"):
            features = features.permute(0, 3, 1, 2)
        elif features.ndim == 3:
            patches = features[:, getattr(self.backbone, "num_prefix_tokens", 0) :]
            side = math.isqrt(patches.shape[1])
            if side**2 == patches.shape[1]:
                features = patches.transpose(1, 2).unflatten(2, (side, side))
        if features.ndim != 4 or features.shape[1] != width:
            raise ValueError(
                f"segmentation needs a feature map with {width} channels, or a square number of patch tokens, but "
                f"the features of the {type(self.backbone).__name__} have the shape {list(features.shape)}"
            )
        return features
