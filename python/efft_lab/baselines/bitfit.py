"""Apply BitFit: train only the biases and the classifier.

Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models", ACL
2022 (arXiv 2106.10199).
"""

from __future__ import annotations

from torch import nn

import efft
from efft_lab.baselines.registry import baseline


@baseline("bitfit")
def apply(model: nn.Module) -> nn.Module:
    """Make only the biases and the classifier trainable."""
    efft.freeze_backbone(model)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_(True)
    return model
