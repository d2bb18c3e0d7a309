"""Sketches of base weights, which can be compared although the weights were rounded to different dtypes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

#: How many rounding errors a sum may differ by; as many random ones add up to about a fifth of that.
_ROUNDINGS = 2.0
#: Relative precision to which a sketch is rounded.
_DIGITS = 2e-3
_NONE = "-"


@torch.no_grad()
def sketch(weights: Mapping[str, Tensor | None]) -> str:
    """Return two numbers for each weight, in the order of their names, as short text for an adapter file.

    The numbers are the product of the weight's first row with a fixed direction and the norm of that row. "-" stands
    for a weight that is missing or does not hold floating-point numbers.
    """
    parts = []
    for _, weight in sorted(weights.items()):
        if weight is None or not weight.is_floating_point():
            parts.append(_NONE)
            continue
        row = weight[0].detach().flatten().cpu().double()
        direction = torch.arange(len(row), dtype=torch.float64).mul(0.7).cos()
        parts.append(f"{(row @ direction).item():.4g} {row.norm().item():.4g}")
    return ", ".join(parts)


def find_differences(names: Iterable[str], ours: str, theirs: str, *dtypes: str) -> list[str]:
    """Return those of the weights whose sketches differ by more than rounding to these dtypes explains.

    Smaller differences, such as those of a base that was fine-tuned a little from the other, are not found.
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
