"""BitFit: train the biases alone.

Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models", ACL
2022 (arXiv 2106.10199).
"""

from torch import nn

import efft


def apply(model: nn.Module) -> nn.Module:
    """Makes every bias and the classifier trainable, and nothing else."""
    efft.freeze_backbone(model)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_(True)
    return model
