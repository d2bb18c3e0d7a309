"""LoRA as the library `peft` does it: W + (alpha / rank) * B A, on chosen linear layers of every block.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022 (arXiv 2106.09685). Rank 8 on qkv has the
0.29 M parameters of the VTAB-1K tables.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

import efft
from efft_lab.baselines.vit import blocks

_LAYERS = ("qkv", "proj", "fc1", "fc2")


def apply(
    model: nn.Module,
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] = ("qkv",),
    dropout: float = 0.0,
) -> nn.Module:
    """Puts LoRA of `peft` on layers of every block, in place; trains it and the classifier.

    Args:
        model: a timm ViT.
        rank: of every update.
        alpha: its scale is alpha / rank; by default the rank, so 1.
        targets: of qkv, proj, fc1 and fc2.
        dropout: of LoRA's input.

    Raises:
        ImportError: peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("method peft_lora needs peft: pip install 'efft-kernels[compare]'") from error
    unknown = set(targets) - set(_LAYERS)
    if unknown or isinstance(targets, str) or not targets:
        raise ValueError(f"targets must be a list of {', '.join(_LAYERS)}, got {targets!r}")
    blocks(model)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=rf"blocks\.\d+\..*\.({'|'.join(targets)})",
    )
    return inject(model, config)


def inject(model: nn.Module, config: Any) -> nn.Module:
    """Puts an adapter of `peft` into any model with a known classifier, in place; trains it and the classifier.

    Args:
        model: the model.
        config: peft's own configuration, a `peft.LoraConfig` say.
    """
    import peft

    head = efft.freeze_backbone(model)
    peft.inject_adapter_in_model(config, model)
    for name in head:  # peft freezes all but its own
        model.get_submodule(name).requires_grad_(True)
    return model
