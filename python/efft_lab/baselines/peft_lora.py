"""Apply LoRA from the library `peft`: replace W by W + (alpha / rank) * B A in selected linear layers of every block.

Reference: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022 (arXiv 2106.09685). With rank 8 on
the layer qkv, A and B of a ViT-B have the 0.29 M parameters that published VTAB-1K tables state for LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

import efft
from efft_lab.baselines.registry import baseline
from efft_lab.baselines.vit import blocks, train_norms

_LAYERS = ("qkv", "proj", "fc1", "fc2")


@baseline("peft_lora")
def apply(
    model: nn.Module,
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] = ("qkv",),
    dropout: float = 0.0,
    bias: Literal["none", "all", "lora_only"] = "none",
    norms: bool = False,
) -> nn.Module:
    """Add LoRA from `peft` to layers of every block, in place. LoRA's matrices and the classifier are trainable.

    Args:
        model: a timm ViT.
        rank: rank of every update.
        alpha: numerator of the scale alpha / rank of the updates; by default, the rank, which gives scale 1.
        targets: names of the layers to adapt, from qkv, proj, fc1 and fc2.
        dropout: dropout rate for the input of LoRA's matrices.
        bias: the biases that are trained too: "none", "all", or "lora_only" for the biases of the adapted layers.
        norms: whether weights and biases of normalization layers are trained too.

    Raises:
        ImportError: peft is not installed.
        ValueError: ``targets`` is not a list of these names, or the model is not a timm ViT.
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
        bias=bias,
    )
    inject(model, config)
    if norms:
        train_norms(model)
    return model


def inject(model: nn.Module, config: Any) -> nn.Module:
    """Add an adapter of `peft` to any model with a known classifier, in place.

    The adapter, the biases that its configuration selects, and the classifier are trainable.

    Args:
        model: the model.
        config: configuration of a method of `peft`, such as ``peft.LoraConfig``.
    """
    import peft

    head = efft.freeze_backbone(model)
    peft.inject_adapter_in_model(config, model)
    for name in head:  # peft freezes everything else
        model.get_submodule(name).requires_grad_(True)
    return model
