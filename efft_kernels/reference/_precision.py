"""The dtype the reference computes in."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
