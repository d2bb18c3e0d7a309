"""LoRA as the library `peft` implements it: W + (alpha / rank) * B A, on chosen linear layers of every block.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022 (arXiv 2106.09685). Rank 8 on qkv has the
0.29 M parameters of the VTAB-1K tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

import efft
from efft_lab.baselines.registry import baseline
from efft_lab.baselines.vit import blocks

_LAYERS = ("qkv", "proj", "fc1", "fc2")


@baseline("peft_lora")
def apply(
    model: nn.Module,
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] = ("qkv",),
    dropout: float = 0.0,
) -> nn.Module:
    """Puts LoRA of `peft` on layers of every block, in place; LoRA's matrices and the classifier train.

    Args:
        model: a timm ViT.
        rank: rank of every update.
        alpha: the scale of the updates is alpha / rank; by default alpha is the rank, and the scale 1.
        targets: which of qkv, proj, fc1 and fc2 are adapted.
        dropout: dropout rate of LoRA's input.

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
    """Puts an adapter of `peft` into any model with a known classifier, in place; both train.

    Args:
        model: the model.
        config: a configuration of peft, such as ``peft.LoraConfig``.
    """
    import peft

    head = efft.freeze_backbone(model)
    peft.inject_adapter_in_model(config, model)
    for name in head:  # peft freezes everything else
        model.get_submodule(name).requires_grad_(True)
    return model
