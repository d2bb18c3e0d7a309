"""Compute sketches of base weights. Sketches can be compared even if the weights have different dtypes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

#: Largest difference between two dot products that counts as rounding, as a multiple of the dtype's machine epsilon
#: times the norm of the row. Random rounding errors add up to about a fifth of this.
_ROUNDINGS = 2.0
#: Relative precision to which a sketch is rounded.
_DIGITS = 2e-3
_NONE = "-"


@torch.no_grad()
def sketch(weights: Mapping[str, Tensor | None]) -> str:
    """Return two numbers per weight as a short text for an adapter file. The weights are ordered by name.

    The first number is the dot product of the weight's first row with a fixed vector, and the second number is the norm
    of the row. "-" stands for a weight that is missing or does not hold floating-point numbers.
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
    """Return the names of the weights whose sketches differ by more than the rounding errors of the given dtypes.

    Smaller differences, such as those from a short fine-tuning of the base model, are not detected.
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
    """Raise ValueError if this value from an adapter file is not a sketch."""
    try:
        if not isinstance(saved, str):
            raise ValueError
        _pairs(saved)
    except ValueError:
        raise ValueError("'base.sketch' must be pairs of numbers or '-', separated by commas") from None


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
