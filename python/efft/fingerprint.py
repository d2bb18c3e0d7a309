"""What tells base weights apart that have been rounded to different dtypes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

#: Roundings that a sum may be off by: of as many random ones it has the size of a fifth.
_ROUNDINGS = 2.0


@torch.no_grad()
def sketch(weights: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Of each weight's first row: its product with a fixed direction, and its norm. Of packed weights nothing."""
    rows = {name: w[0].detach().flatten().cpu().double() for name, w in weights.items() if w.is_floating_point()}
    found = {}
    for name, row in rows.items():
        direction = torch.arange(len(row), dtype=torch.float64).mul(0.7).cos()
        found[name] = [float(f"{value:.6g}") for value in ((row @ direction).item(), row.norm().item())]
    return found


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any], *dtypes: str) -> list[str]:
    """The layers whose sketches differ by more than rounding to these dtypes explains.

    Bases that differ by less, such as one fine-tuned a little from the other, are not told apart.
    """
    kinds = [getattr(torch, name.removeprefix("torch."), None) for name in dtypes]
    if not all(isinstance(kind, torch.dtype) and kind.is_floating_point for kind in kinds):
        return []
    share = _ROUNDINGS * max(torch.finfo(kind).eps for kind in kinds if kind is not None)
    return [
        name
        for name in ours.keys() & theirs.keys()
        if abs(ours[name][0] - theirs[name][0]) > share * max(ours[name][1], theirs[name][1]) + 1e-6
    ]


def check(saved: object) -> None:
    """Raise ValueError if this, from an adapter file, is no sketch."""
    numbers = saved.values() if isinstance(saved, dict) else None
    if numbers is None or not all(
        isinstance(pair, list)
        and len(pair) == 2
        and all(type(value) in (int, float) and math.isfinite(value) for value in pair)
        for pair in numbers
    ):
        raise ValueError("'base.sketch' must be an object of pairs of numbers")
