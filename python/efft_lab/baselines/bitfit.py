"""Apply BitFit: train only the biases and the classifier, and optionally the weights of the normalization layers.

Reference: Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models", ACL 2022 (arXiv 2106.10199).
"""

from __future__ import annotations

from torch import nn

import efft
from efft_lab.baselines.registry import baseline
from efft_lab.baselines.vit import train_norms


@baseline("bitfit")
def apply(model: nn.Module, norms: bool = False) -> nn.Module:
    """Make only the biases and the classifier trainable, in place.

    Args:
        model: any model with a known classifier.
        norms: whether the weights of normalization layers are trained too. Their biases are always trained.
    """
    efft.freeze_backbone(model)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_(True)
    if norms:
        train_norms(model)
    return model
