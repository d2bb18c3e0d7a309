"""Define linear layers that hold the updates, or entire weights, of many adapters. A call uses the selected adapters.

The adapters are stored as *stacks*: tensors with one row (entry of the first dimension) per adapter. Row 0 stands for
the frozen base model without an adapter.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efft_kernels.nn.frozen import FrozenLayer, read_by_its_parent
from efft_kernels.nn.linear import adapted_linear, frozen_linear, multiplies_plainly
from efft_kernels.ops import tt_linear_grouped


class Selection(NamedTuple):
    """Select rows of the stacks: one row per sample of a batch or, with ``weights``, a weighted sum for all samples."""

    slots: Tensor  # int64 [samples], or [k] with weights: the selected rows
    weights: Tensor | None  # fp32 (fp64 for an fp64 model) [k]


#: The dimension of an input [..., in_features] that indexes the samples of a batch. It is 0 even if each sample has
#: several consecutive entries in the first dimension. It is -1 if consecutive rows belong to different samples, and
#: None if no dimension indexes the samples.
Layout = int | None


def place_of(x: Tensor, samples: int, layouts: Mapping[int, Layout], learned: bool, name: str) -> int:
    """Return the dimension of ``x`` that indexes the samples, or -1 (see :data:`Layout`).

    Args:
        x: the input of a module.
        samples: the number of samples.
        layouts, learned: as in :class:`PooledLinear`.
        name: the class of the module, for the error.

    Raises:
        ValueError: ``x`` has no such dimension, or it is not known.
    """
    rows = math.prod(x.shape[:-1])
    if rows == samples:
        return 0
    # This order of checks does not read ``learned`` if only the first dimension can index the samples. Code that was
    # compiled for such inputs therefore stays valid when the layouts become known.
    usual = x.shape[0] == samples and (samples not in x.shape[1:-1] or learned)
    place = layouts.get(x.dim(), 0 if usual else None)
    if place is None or rows % samples or (place > 0 and x.shape[place] != samples):
        raise ValueError(
            f"{name}: expected the rows of {samples} samples, one after the other, got an input of "
            f"shape {list(x.shape)}; a layer that mixes samples, or is not known to keep them in order, cannot use "
            "one adapter per sample (an uncompiled call of the whole model detects the order)"
        )
    return place


class PooledLinear(FrozenLayer, nn.Linear):
    """Compute a frozen linear layer with the selected adapters. Two stacks contain one row per adapter.

    This is an ``nn.Linear`` with the same ``weight``, ``bias`` and hooks as the layer that it replaces. Several layers
    may share the stacks, which are not part of the layer's state dict.

    Args:
        linear: the layer to replace.
        selected: the context variable that contains the current :class:`Selection`, or None to use only the base model.
            Each thread and each asyncio task has its own value.

    Raises:
        TypeError: ``linear`` is not a plain ``nn.Linear``.
    """

    stacks: tuple[Tensor, Tensor | None]
    layouts: dict[int, Layout]
    """Maps the number of dimensions of an input to its :data:`Layout`, unless that is 0."""
    learned: bool
    """Whether ``layouts`` is known. If it is not, the samples must be in the first dimension of an input."""

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        return super().refusal(layer) or read_by_its_parent(layer)

    def __init__(self, linear: nn.Linear, selected: ContextVar[Selection | None]) -> None:
        super().__init__(linear)
        self.selected, self.layouts, self.learned = selected, {}, False

    def forward(self, x: Tensor) -> Tensor:  # [..., in_features] -> [..., out_features]
        selection = self.selected.get()
        if selection is None:
            return frozen_linear(self, x)
        slots, weights = selection
        if weights is not None:
            return self.summed(x, slots, weights)
        samples = len(slots)
        place = place_of(x, samples, self.layouts, self.learned, type(self).__name__)
        if place == -1:
            x_of = x.reshape(-1, samples, self.in_features).transpose(0, 1)
            y = self.one_each(x_of, slots).transpose(0, 1)  # [rows / samples, samples, out_features]
            return y.reshape(*x.shape[:-1], self.out_features)
        first = x.movedim(place, 0)
        y = self.one_each(first.reshape(samples, -1, self.in_features), slots)
        return y.reshape(*first.shape[:-1], self.out_features).movedim(0, place)

    @abstractmethod
    def mixed(self, slots: Tensor, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return one tensor per stack that represents the weighted sum of the adapters in ``slots`` [k]."""

    @abstractmethod
    def summed(self, x: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """Return the output for ``x`` [..., in_features] with the weighted sum of the adapters in ``slots`` [k]."""

    @abstractmethod
    def one_each(self, x: Tensor, slots: Tensor) -> Tensor:
        """Return the output for ``x`` [samples, rows, in_features], where sample i uses the adapter ``slots[i]``."""


class PooledDelta(PooledLinear):
    """Compute ``y = x Wᵀ + b + (x D) G`` with stacks D ``[n, in_features, r]`` and G ``[n, r', out_features]``.

    Row 0 of the stacks is zero, and so are the entries beyond the rank of each adapter. An adapter's rank is at most
    the smaller of r and r'.
    """

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the stacks D and G, cut to the same rank."""
        D, G = self.stacks
        assert G is not None
        rank = min(D.shape[2], G.shape[1])  # layers with a higher rank may share D
        return D[:, :, :rank], G[:, :rank]

    def mixed(self, slots: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``D = [D_1 | D_2 | ...]`` and ``G = [w_1 G_1; w_2 G_2; ...]``.

        Their product is exactly the weighted sum of the updates. Its rank is the sum of all ranks.
        """
        D, G = self.factors()
        D = D[slots].transpose(0, 1).flatten(1)  # [in_features, k r]
        return D, (weights[:, None, None] * G[slots]).flatten(0, 1).to(D.dtype)  # [k r, out_features]

    def summed(self, x: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        return adapted_linear(self, x, *self.mixed(slots, weights))

    def one_each(self, x: Tensor, slots: Tensor) -> Tensor:
        D, G = self.factors()
        if multiplies_plainly(self, self.weight):
            return tt_linear_grouped(x, self.weight, self.bias, D, G, slots)
        h = torch.bmm(x, D[slots].to(x.dtype))  # [samples, rows, r]
        return frozen_linear(self, x) + torch.bmm(h, G[slots].to(x.dtype))


class PooledWeights(PooledLinear):
    """Compute ``y = x Wᵀ + b``, where each adapter replaces the entire weight and bias, as in a classifier.

    The stacks are W ``[n, out_features, in_features]`` and b ``[n, out_features]`` or None. Row 0 contains the base.
    """

    def mixed(self, slots: Tensor, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        W, b = self.stacks
        summed = (weights[:, None, None] * W[slots]).sum(0).to(W.dtype)
        return summed, None if b is None else (weights[:, None] * b[slots]).sum(0).to(b.dtype)

    def summed(self, x: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        return F.linear(x, *self.mixed(slots, weights))

    def one_each(self, x: Tensor, slots: Tensor) -> Tensor:
        W, b = self.stacks
        W = W[slots].transpose(1, 2)  # [samples, in_features, out_features]
        return torch.bmm(x, W) if b is None else torch.baddbmm(b[slots][:, None], x, W)
