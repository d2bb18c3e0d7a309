"""Autocast on any device, also on meta, which has none.

By name: ``torch.amp.is_autocast_available`` breaks the graph of ``torch.compile`` in torch 2.10.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast casts to on ``device``; None where it is off or does not exist."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def autocast_like_linear(first: Tensor, *others: Tensor | None) -> Any:
    """Tensors of one device cast as autocast casts the arguments of torch's linear; those in fp64 stay."""
    dtype = autocast_dtype(first.device)
    if dtype is None:
        return first, *others
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (first, *others))


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A context in which nothing on ``device`` is cast."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):  # entering it costs more than asking
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
