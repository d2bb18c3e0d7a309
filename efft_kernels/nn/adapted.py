"""Define ``AdaptedWeight``, a frozen weight with an update from a bank of factors, in any kind of module.

A *bank* is the module that owns the trained factors of many layers. A *site* is the part of a bank that one weight
uses. The update ``(D G)ᵀ`` is added to a matrix ``[d_out, d_in]``. A *view* states how the weight stores this matrix:

- ``"linear"``: the weight is ``[d_out, d_in]``.
- ``"transposed"``: the weight is ``[d_in, d_out]``.
- ``"convolution"``: the weight is ``[d_out, ...]``; all dimensions except the first form d_in.
- ``"stacked"``: the weight is ``[..., d_in]``; all dimensions except the last form d_out.

The views of weights that store many experts are in :mod:`efft_kernels.nn.experts`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from efft_kernels._arguments import no_autocast
from efft_kernels.nn.bank import Binding, FactorBank
from efft_kernels.nn.frozen import dequantized, is_conv1d, is_plain, stored_in
from efft_kernels.ops import tt_merge_

VIEWS = ("linear", "transposed", "convolution", "stacked")


def as_matrix(weight: Tensor, view: str) -> Tensor:
    """Return the matrix ``[d_out, d_in]`` of a weight, without a copy if the strides allow it."""
    if view == "transposed":
        return weight.t()
    if view == "stacked":
        return weight.flatten(0, -2)
    return weight.flatten(1) if weight.dim() > 2 else weight


def from_matrix(matrix: Tensor, view: str, shape: Sequence[int]) -> Tensor:
    """Return a matrix ``[d_out, d_in]`` as a weight with this shape: the inverse of :func:`as_matrix`."""
    if view == "linear":
        return matrix  # the shape of a quantized weight may be that of its packed values, so nothing is reshaped
    return matrix.t() if view == "transposed" else matrix.reshape(shape)


def view_of(layer: nn.Module) -> str:
    """Return the view that states how the matrix of a layer is stored in the layer's weight."""
    if isinstance(layer, nn.Embedding) or is_conv1d(layer):
        return "transposed"
    return "convolution" if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else "linear"


def matrix_sizes(weight: nn.Module | Tensor, view: str = "linear") -> tuple[int, int]:
    """Return (d_in, d_out) of the matrix of a layer, or of the matrix that a parameter stores according to ``view``.

    A convolution multiplies by its matrix at each position of the input: d_in is the number of input channels per group
    times the number of kernel positions.
    """
    if isinstance(weight, Tensor):
        rows, columns = weight.shape[0], math.prod(weight.shape[1:])
        if view == "stacked":
            rows, columns = math.prod(weight.shape[:-1]), weight.shape[-1]
        return (rows, columns) if view == "transposed" else (columns, rows)
    layer: Any = weight
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return int(layer.in_channels // layer.groups * math.prod(layer.kernel_size)), int(layer.out_channels)
    if isinstance(layer, nn.Embedding):
        return int(layer.num_embeddings), int(layer.embedding_dim)
    if is_conv1d(layer):
        return tuple(stored_in(layer, "weight").shape)  # type: ignore[return-value]
    assert isinstance(layer, nn.Linear)
    return int(layer.in_features), int(layer.out_features)  # some models store these numbers as tensors


def add_update_(weight: Tensor, view: str, D: Tensor, G: Tensor) -> None:
    """Add the update ``(D G)ᵀ`` to a weight in place, in fp32 with one rounding.

    Args:
        weight: the weight that contains the matrix ``[d_out, d_in]``.
        view: how the matrix is stored in the weight (see the description of this module).
        D: ``[d_in, r]``.
        G: ``[r, d_out]``.
    """
    matrix = as_matrix(weight, view)
    tt_merge_(matrix, D, G)
    if view in ("convolution", "stacked"):  # as_matrix copies the kernel of a channels-last convolution
        weight.copy_(from_matrix(matrix, view, weight.shape))


@dataclass(frozen=True)
class MergeLoss:
    """Report how rounding changed the update of one weight in a merge.

    The norms are Frobenius norms, computed in fp32 (fp64 if the weight or the update is in fp64).

    Attributes:
        relative_update: |ΔW| / |W|.
        relative_error: |achieved - ΔW| / |ΔW|, where achieved is the change of the stored weight. This is the part of
            the update that is lost when the sum is rounded to the weight's dtype. 0 for a zero update.
    """

    relative_update: float
    relative_error: float


class AdaptedWeight:
    """Represent a frozen weight whose matrix ``[d_out, d_in]`` has the update ``(D G)ᵀ`` from a bank of factors.

    Attributes:
        factors: the bank.
        site: the part of the bank that this weight uses.
        binding: the connection of this weight to its site (:class:`efft_kernels.nn.bank.Binding`).
        view: how the matrix is stored in the weight.
        enabled: whether the update is applied.
        base_weight: the weight before the update was merged into it; None if nothing is merged.
        sharing: all adapted weights that share this update and this stored weight, if there are several.
    """

    factors: FactorBank
    site: Any
    binding: Binding
    view: str = "linear"
    enabled: bool
    base_weight: Tensor | None
    sharing: Sequence[AdaptedWeight] = ()

    @property
    def stored(self) -> Tensor:
        """The weight that the module owns, which contains the update only while the update is merged."""
        raise NotImplementedError

    def store(self, weight: nn.Parameter) -> None:
        """Make the module own another weight."""
        raise NotImplementedError

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the matrix ``[d_out, d_in]`` of a tensor shaped like the weight, without a copy if possible."""
        return as_matrix(weight, self.view)

    def shaped(self, matrix: Tensor) -> Tensor:
        """Reshape a matrix ``[d_out, d_in]`` to the shape of the weight."""
        return from_matrix(matrix, self.view, self.stored.shape)

    @property
    def merged(self) -> bool:
        """Whether the stored weight contains the update now."""
        return self.base_weight is not None

    def share(self, other: AdaptedWeight) -> None:
        """Use the binding and the update of ``other``, which has the same stored weight.

        Merging either of the two then merges both.
        """
        self.factors.bindings.remove(self.binding)
        self.binding = other.binding
        together = [*(other.sharing or (other,)), self]
        for weight in together:
            weight.sharing = together

    def evaluated(self) -> tuple[Tensor, Tensor]:
        """Return (D [d_in, r], G [r, d_out]) from the current factors, without dropout, at any time."""
        return self.factors.evaluated(self.site)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return (D [d_in, r], G [r, d_out]) of the model's running forward pass, with its dropout; differentiable."""
        return self.factors.pair(self.site, *self.factors.down_up(self.binding))

    def update(self, D: Tensor, G: Tensor) -> Tensor:
        """Return the dense update in the weight's shape and the factors' dtype; differentiable."""
        with no_autocast(D.device):
            return self.shaped((D @ G).t())

    def summed(self, W: Tensor, D: Tensor, G: Tensor) -> Tensor:
        """Return the dense sum of ``W`` and the update, rounded once to the dtype of ``W``; differentiable."""
        delta = self.update(D, G)
        wide = torch.promote_types(W.dtype, delta.dtype)
        return (dequantized(W).to(wide) + delta.to(wide)).to(W.dtype)

    def batched(self, x: Tensor, W: Tensor, D: Tensor, G: Tensor) -> Tensor | None:
        """Return the products of ``x[i]`` with ``W[i]`` plus its update, without computing the dense sums.

        Return None if ``W`` is not a batch of matrices ``[d_in, d_out]``.
        """
        return None

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return the dense update ΔW for inspection: in the weight's shape and the factors' dtype, without dropout."""
        return self.update(*self.evaluated())

    @torch.no_grad()
    def merge(self, dequantize: bool = False) -> MergeLoss | None:
        """Add the update to the weight, in fp32 with one rounding. A copy of the base weight makes unmerge exact.

        A quantized weight cannot store this sum. With ``dequantize``, a dense weight replaces the quantized weight
        until :meth:`unmerge`. The dense weight has the dtype that the quantized weight reports.

        Returns:
            The size of the update and the rounding error; None if the update was merged already.

        Raises:
            TypeError: the weight is quantized (or another tensor subclass), and ``dequantize`` is not set or the class
                of the weight has no method to dequantize it. Nothing is changed.
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
                "dequantize=True (a dense weight then replaces the quantized one), or do not merge the update"
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
        add_update_(W, self.view, D, G)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base weight exactly. Do nothing if nothing is merged."""
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
        self.factors.forget()

    def describe(self) -> str:
        """Describe the update in the terms of its bank, and state whether it is merged or disabled."""
        parts = [self.factors.describe(self.site)]
        if self.merged:
            parts.append("merged")
        if not self.enabled:
            parts.append("disabled")
        return ", ".join(parts)

    def _check_sizes(self, factors: FactorBank, site: Any, sizes: tuple[int, int], name: str) -> None:
        expected = factors.sizes(site)
        if expected != sizes:
            raise ValueError(
                f"{name}: {site} of this bank fits a linear layer with (in_features, out_features) = "
                f"{expected}, got {sizes}"
            )
