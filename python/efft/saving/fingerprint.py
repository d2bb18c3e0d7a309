"""What tells base weights apart that have been rounded to different dtypes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

#: Roundings that a sum may be off by: of as many random ones it has the size of a fifth.
_ROUNDINGS = 2.0
#: What a sketch is rounded to, as a share.
_DIGITS = 2e-3
_NONE = "-"


@torch.no_grad()
def sketch(weights: Mapping[str, Tensor | None]) -> str:
    """Of each weight, in the order of their names, the product of the first row with a fixed direction, and its norm;
    "-" where there is none, or no floating-point numbers. Short, since an adapter file has one."""
    parts = []
    for _, weight in sorted(weights.items()):
        if weight is None or not weight.is_floating_point():
            parts.append(_NONE)
            continue
        row = weight[0].detach().flatten().cpu().double()
        direction = torch.arange(len(row), dtype=torch.float64).mul(0.7).cos()
        parts.append(f"{(row @ direction).item():.4g} {row.norm().item():.4g}")
    return ", ".join(parts)


def differing(names: Iterable[str], ours: str, theirs: str, *dtypes: str) -> list[str]:
    """The weights, of these names, whose sketches differ by more than rounding to these dtypes explains.

    Bases that differ by less, such as one fine-tuned a little from the other, are not told apart.
    """
    kinds = [getattr(torch, name.removeprefix("torch."), None) for name in dtypes]
    pairs = list(zip(sorted(names), _pairs(ours), _pairs(theirs), strict=False))
    if not all(isinstance(kind, torch.dtype) and kind.is_floating_point for kind in kinds):
        return []
    share = max(_DIGITS, *(_ROUNDINGS * torch.finfo(kind).eps for kind in kinds if kind is not None))
    return [
        name
        for name, our, their in pairs
        if our and their and abs(our[0] - their[0]) > share * max(our[1], their[1]) + 1e-6
    ]


def check(saved: object) -> None:
    """Raise ValueError if this part of an adapter file is not a sketch."""
    try:
        if not isinstance(saved, str):
            raise ValueError
        _pairs(saved)
    except ValueError:
        raise ValueError("'base.sketch' must be pairs of numbers, or -, between commas") from None


def _pairs(text: str) -> list[tuple[float, float] | None]:
    found: list[tuple[float, float] | None] = []
    for part in text.split(", ") if text else []:
        if part == _NONE:
            found.append(None)
            continue
        product, norm = map(float, part.split(" "))
        if not math.isfinite(product) or not math.isfinite(norm):
            raise ValueError
        found.append((product, norm))
    return found
