"""Provide the paper's settings for its architectures.

The ranks are those in the paper's public code. With the rank for ViT-B, the trained parameters are 0.28 % of the model,
as in the paper.
"""

from __future__ import annotations

from typing import Any, Literal

from efft.methods.efft import EfftConfig

_STAGES = range(4)


def _swin(attention: int, mlp: int) -> dict[str, int | tuple[int, int]]:
    """Return ranks by group, which double from stage to stage, as the width does. MLP cores are [mlp, 2 mlp]."""
    ranks: dict[str, int | tuple[int, int]] = {}
    for i in _STAGES:
        ranks[f"stage{i + 1}_mhsa"] = attention << i
        ranks[f"stage{i + 1}_ffn"] = (mlp << i, 2 * mlp << i)
    return ranks


_RANKS: dict[str, int | dict[str, int | tuple[int, int]]] = {
    "vit_base": 32,
    "vit_large": 24,
    "vit_huge": 32,
    "swin_tiny": _swin(4, 4),
    "swin_small": _swin(4, 4),
    "swin_base": _swin(4, 2),
    "swin_large": _swin(8, 8),
}


def paper_config(architecture: str, variant: Literal["efft1", "efft2"] = "efft2", **changes: Any) -> EfftConfig:
    """Return the paper's configuration for an architecture, given by its timm name or the beginning of the name.

    ``changes`` override fields. There is no efft1 configuration for Swin, because attention and MLPs have different
    ranks there.

    Raises:
        ValueError: the paper's code has no ranks for the architecture.
    """
    family = next((name for name in _RANKS if architecture.startswith(name)), None)
    if family is None or (variant == "efft1" and family.startswith("swin")):
        raise ValueError(
            f"the paper's code has no {variant} ranks for {architecture!r}; it has efft2 for {', '.join(_RANKS)} and "
            "efft1 for the vit_ ones. Set EfftConfig(rank=...) yourself"
        )
    fields: dict[str, Any] = {"variant": variant, "rank": _RANKS[family]}
    if family.startswith("swin"):
        fields["core_init"] = "first"
    return EfftConfig(**{**fields, **changes})
