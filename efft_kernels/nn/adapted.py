"""``AdaptedWeight``: a frozen weight with an update from a bank of factors, whatever module it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from efft_kernels._arguments import no_autocast
from efft_kernels.nn.bank import Binding, FactorBank
from efft_kernels.nn.weights import dequantized, is_plain
from efft_kernels.ops import tt_merge_


@dataclass(frozen=True)
class MergeLoss:
    """What merging did to one weight; norms are Frobenius norms in fp32.

    Attributes:
        relative_update: |ΔW| / |W|.
        relative_error: |achieved - ΔW| / |ΔW|, where achieved is the change of the stored weight: the part of the
            update lost by rounding to the weight's dtype. 0 for a zero update.
    """

    relative_update: float
    relative_error: float


class AdaptedWeight:
    """A frozen weight that, as a matrix ``[d_out, d_in]``, has the update ``(D G)ᵀ`` from a bank of factors.

    How the matrix lies in the weight is what :meth:`matrix` and :meth:`shaped` say; here the weight is the matrix.

    Attributes:
        factors, site, binding: the bank, the part of it that this weight uses, and the hold on that part.
        enabled: whether the update counts.
        base_weight: the weight as it was before the update was merged into it; None if it is not merged.
        sharing: all that have this update and this weight in common, if any.
    """

    factors: FactorBank
    site: Any
    binding: Binding
    enabled: bool
    base_weight: Tensor | None
    sharing: Sequence[AdaptedWeight] = ()

    @property
    def stored(self) -> Tensor:
        """The weight that the module owns, without the update unless it is merged."""
        raise NotImplementedError

    def store(self, weight: nn.Parameter) -> None:
        """Let the module own another weight."""
        raise NotImplementedError

    def matrix(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as the matrix ``[d_out, d_in]``; a view where there can be one."""
        return weight

    def shaped(self, matrix: Tensor) -> Tensor:
        """A matrix ``[d_out, d_in]`` in the shape of the weight."""
        return matrix

    @property
    def merged(self) -> bool:
        """Whether the update is part of the stored weight now."""
        return self.base_weight is not None

    def share(self, other: AdaptedWeight) -> None:
        """Have the update of ``other``, whose stored weight is this one's too: what is merged into one is merged into
        both."""
        self.factors.bindings.remove(self.binding)
        self.binding = other.binding
        together = [*(other.sharing or (other,)), self]
        for weight in together:
            weight.sharing = together

    def evaluated(self) -> tuple[Tensor, Tensor]:
        """(D [d_in, r], G [r, d_out]) as they are now and without dropout, whatever runs and whatever mode the bank
        is in."""
        return self.factors.evaluated(self.site)

    def pair(self) -> tuple[Tensor, Tensor]:
        """(D [d_in, r], G [r, d_out]) of the pass that runs, with its dropout; differentiable."""
        return self.factors.pair(self.site, *self.factors.down_up(self.binding))

    def update(self, D: Tensor, G: Tensor) -> Tensor:
        """The dense update of the weight's shape, in the dtype of the factors; differentiable."""
        with no_autocast(D.device):
            return self.shaped((D @ G).t())

    def summed(self, W: Tensor, D: Tensor, G: Tensor) -> Tensor:
        """``W`` with the update, dense and in its dtype, rounded once; differentiable."""
        delta = self.update(D, G)
        wide = torch.promote_types(W.dtype, delta.dtype)
        return (dequantized(W).to(wide) + delta.to(wide)).to(W.dtype)

    def batched(self, x: Tensor, W: Tensor, D: Tensor, G: Tensor) -> Tensor | None:
        """The batch of products ``x[i] W[i]`` with the update of each and without the dense sums; None where ``W`` is
        no batch of matrices ``[d_in, d_out]``."""
        return None

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """The dense update ΔW of the weight's shape in the factors' dtype, without dropout: for inspection."""
        return self.update(*self.evaluated())

    @torch.no_grad()
    def merge(self, dequantize: bool = False) -> MergeLoss | None:
        """Add the update to the weight, in fp32 with one rounding, keeping the base weight so that unmerge is exact.

        A quantised weight holds no such sum: with ``dequantize`` a dense one in its dtype takes its place until then.

        Returns what rounding cost; None if the update was merged already.

        Raises:
            TypeError: the weight is quantised (or another tensor subclass), and ``dequantize`` is not set or not known
                to it; nothing is changed.
        """
        if self.merged:
            return None
        W, pair = self.stored, self.evaluated()
        if is_plain(W):
            kept = base = W.detach().clone()
        elif dequantize:
            kept, base = W.detach(), dequantized(W)
            W = nn.Parameter(base.clone(), requires_grad=False)
            self.store(W)
        else:
            raise TypeError(
                f"the weight is a {type(W).__name__}, to which no update can be added: merge with "
                "dequantize=True (a dense weight takes its place), or keep the update beside it"
            )
        self._add(W, *pair)
        self._keep(kept)
        delta = self.update(*pair)
        wide = torch.promote_types(base.dtype, delta.dtype)
        lost = (W.to(wide) - base.to(wide)) - delta
        size = delta.norm()
        return MergeLoss(
            relative_update=(size / base.to(wide).norm()).item(),
            relative_error=(lost.norm() / size).item() if size > 0 else 0.0,
        )

    def _add(self, W: Tensor, D: Tensor, G: Tensor) -> None:
        """Add the update to ``W`` in place, in fp32 with one rounding."""
        matrix = self.matrix(W)  # of a convolution whose channels come last this is a copy
        tt_merge_(matrix, D, G)
        W.copy_(self.shaped(matrix))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back, bit for bit. Does nothing where nothing is merged."""
        if self.base_weight is None:
            return
        if is_plain(self.base_weight):
            self.stored.copy_(self.base_weight)
        else:
            self.store(nn.Parameter(self.base_weight, requires_grad=False))
        self._keep(None)

    def _keep(self, base: Tensor | None) -> None:
        for weight in self.sharing or (self,):
            weight.base_weight = base
        self.binding.merged = base is not None

    def describe(self) -> str:
        """The update in the words of its bank, and what has become of it."""
        parts = [self.factors.describe(self.site)]
        if self.merged:
            parts.append("merged")
        if not self.enabled:
            parts.append("disabled")
        return ", ".join(parts)

    def _check_sizes(self, factors: FactorBank, site: Any, sizes: tuple[int, int], name: str) -> None:
        expected = factors.features(site)
        if expected != sizes:
            raise ValueError(
                f"{name}: {site} of this bank fits a linear layer with (in_features, out_features) = "
                f"{expected}, got {sizes}"
            )
