"""Leading dimensions flattened inside an autograd function: outside of it each reshape would be a node of the graph."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def flat(tensor: Tensor) -> Tensor:
    """``tensor`` [..., d] as [tokens, d].

    Save the tensor itself for backward, not this: of a view made without gradients autograd would report a change in
    other words, and a second derivative would not find what it was made from.
    """
    # Not by Size.numel(), which would fix what an export leaves open.
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def unflat(tensor: Tensor, leading: Sequence[int]) -> Tensor:
    """``tensor`` [tokens, d], made here and used by nobody else, as [*leading, d].

    Not by ``view``: autograd refuses to change a view in place that a forward made.
    """
    return torch.ops.aten._unsafe_view(tensor, (*leading, tensor.shape[-1]))
