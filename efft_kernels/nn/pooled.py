"""Linear layers that hold what many adapters do to them, and use in each call what the running context selected."""

from __future__ import annotations

from abc import abstractmethod
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efft_kernels.nn.linear import cannot_wrap, share_attributes
from efft_kernels.ops import tt_linear, tt_linear_grouped


class Selection(NamedTuple):
    """Rows of the stacks: one for each sample of a batch, or with ``weights`` their weighted sum for all samples."""

    slots: Tensor  # int64 [samples] or [k]
    weights: Tensor | None  # fp32 [k]


class PooledLinear(nn.Linear):
    """A frozen linear layer and two stacks of tensors, a row an adapter; row 0 is the base.

    It is an ``nn.Linear`` with the same ``weight``, ``bias`` and hooks (the very objects of the layer it replaces). The
    stacks may be shared with other layers and are no part of its state.

    Args:
        linear: the layer to stand in for.
        selected: the :class:`Selection` of the running context, None for the base alone. Threads and tasks each have
            their own.

    Raises:
        TypeError: not a plain ``nn.Linear``.
    """

    stacks: tuple[Tensor, Tensor | None]

    def __init__(self, linear: nn.Linear, selected: ContextVar[Selection | None]) -> None:
        reason = cannot_wrap(linear)
        if reason is not None:
            raise TypeError(f"{type(self).__name__}: {reason}")
        nn.Module.__init__(self)  # nn.Linear's own would allocate and draw a weight
        share_attributes(linear, self)
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.selected = selected

    def forward(self, x: Tensor) -> Tensor:  # [..., in_features] -> [..., out_features]
        selection = self.selected.get()
        if selection is None:
            return F.linear(x, self.weight, self.bias)
        slots, weights = selection
        if weights is not None:
            return self.summed(x, slots, weights)
        rows, samples = x.shape[:-1].numel(), len(slots)
        if rows % samples:
            raise ValueError(
                f"{type(self).__name__}: expected the rows of {samples} samples, one after the other, got an input of "
                f"shape {list(x.shape)}; a layer that mixes samples cannot use an adapter for each"
            )
        y = self.one_each(x.reshape(samples, rows // samples, self.in_features), slots)
        return y.reshape(*x.shape[:-1], self.out_features)

    @abstractmethod
    def summed(self, x: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """The output for ``x`` [..., in_features] under the weighted sum of the adapters in ``slots`` [k]."""

    @abstractmethod
    def one_each(self, x: Tensor, slots: Tensor) -> Tensor:
        """The output for ``x`` [samples, rows, in_features], each sample under the adapter in ``slots`` [samples]."""


class PooledDelta(PooledLinear):
    """``y = x Wᵀ + b + (x D) G``; the stacks are D ``[n, in_features, r]`` and G ``[n, r', out_features]``, zero in row
    0 and beyond the rank of an adapter, which is no more than the smaller of r and r'."""

    def _factors(self) -> tuple[Tensor, Tensor]:
        D, G = self.stacks
        assert G is not None
        rank = min(D.shape[2], G.shape[1])  # D may be shared with layers of higher rank
        return D[:, :, :rank], G[:, :rank]

    def summed(self, x: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """``D = [D_1 | D_2 | ...]`` and ``G = [w_1 G_1; w_2 G_2; ...]``: exact, at the rank of all together."""
        D, G = self._factors()
        D = D[slots].transpose(0, 1).flatten(1)  # [in_features, k r]
        G = (weights[:, None, None] * G[slots]).flatten(0, 1).to(D.dtype)  # [k r, out_features]
        return tt_linear(x, self.weight, self.bias, D, G)

    def one_each(self, x: Tensor, slots: Tensor) -> Tensor:
        return tt_linear_grouped(x, self.weight, self.bias, *self._factors(), slots)


class PooledWeights(PooledLinear):
    """``y = x Wᵀ + b`` with whole weights of each adapter's own, as in a classifier; the stacks are W ``[n,
    out_features, in_features]`` and b ``[n, out_features]`` or None, the base's in row 0."""

    def summed(self, x: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        W, b = self.stacks
        summed = (weights[:, None, None] * W[slots]).sum(0).to(W.dtype)
        return F.linear(x, summed, None if b is None else (weights[:, None] * b[slots]).sum(0).to(b.dtype))

    def one_each(self, x: Tensor, slots: Tensor) -> Tensor:
        W, b = self.stacks
        W = W[slots].transpose(1, 2)  # [samples, in_features, out_features]
        return torch.bmm(x, W) if b is None else torch.baddbmm(b[slots][:, None], x, W)
