"""``AdaptedWeight``: a frozen weight with an update from a bank of factors, whatever module it belongs to.

The update is that of a matrix ``[d_out, d_in]``. A *view* says how this matrix lies in the weight: ``"linear"``
``[d_out, d_in]``, ``"transposed"`` ``[d_in, d_out]``, ``"convolution"`` ``[d_out, ...]`` (all dimensions but the first
make up d_in), ``"stacked"`` ``[..., d_in]`` (all dimensions but the last make up d_out).
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
    """Return the matrix ``[d_out, d_in]`` of a weight; it is a view of the weight wherever it can be one."""
    if view == "transposed":
        return weight.t()
    if view == "stacked":
        return weight.flatten(0, -2)
    return weight.flatten(1) if weight.dim() > 2 else weight


def from_matrix(matrix: Tensor, view: str, shape: Sequence[int]) -> Tensor:
    """Return a matrix ``[d_out, d_in]`` as a weight of this shape: the inverse of :func:`as_matrix`."""
    if view == "linear":
        return matrix  # the shape of a quantized weight is that of its packed values
    return matrix.t() if view == "transposed" else matrix.reshape(shape)


def view_of(layer: nn.Module) -> str:
    """Return the view by which the matrix of a layer lies in its weight."""
    if isinstance(layer, nn.Embedding) or is_conv1d(layer):
        return "transposed"
    return "convolution" if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else "linear"


def matrix_sizes(weight: nn.Module | Tensor, view: str = "linear") -> tuple[int, int]:
    """Return (d_in, d_out) of the matrix of a layer's weight, or of a parameter in which it lies by ``view``.

    A convolution multiplies by its matrix at each position of the input: d_in counts channels and kernel positions.
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
    return int(layer.in_features), int(layer.out_features)  # some models compute these as tensors


def add_update_(weight: Tensor, view: str, D: Tensor, G: Tensor) -> None:
    """Add the update ``(D G)ᵀ`` to a weight in place, in fp32 with one rounding.

    Args:
        weight: the weight, in which its matrix ``[d_out, d_in]`` lies by ``view``.
        view: see above.
        D: ``[d_in, r]``.
        G: ``[r, d_out]``.
    """
    matrix = as_matrix(weight, view)
    tt_merge_(matrix, D, G)
    if view in ("convolution", "stacked"):  # the matrix of a convolution whose channels come last is a copy
        weight.copy_(from_matrix(matrix, view, weight.shape))


@dataclass(frozen=True)
class MergeLoss:
    """What merging did to one weight; norms are Frobenius norms in fp32.

    Attributes:
        relative_update: |ΔW| / |W|.
        relative_error: |achieved - ΔW| / |ΔW|, where achieved is the change of the stored weight: the part of the
            update that rounding to the weight's dtype loses. 0 for a zero update.
    """

    relative_update: float
    relative_error: float


class AdaptedWeight:
    """A frozen weight whose matrix ``[d_out, d_in]`` has the update ``(D G)ᵀ`` from a bank of factors.

    Attributes:
        factors, site, binding: the bank, the part of it that this weight uses, and its hold on that part.
        view: how the matrix lies in the weight.
        enabled: whether the update counts.
        base_weight: the weight before the update was merged into it; None if nothing is merged.
        sharing: all adapted weights that have this update and this stored weight in common, if there are several.
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
        """The weight that the module owns, which has the update only while it is merged."""
        raise NotImplementedError

    def store(self, weight: nn.Parameter) -> None:
        """Let the module own another weight."""
        raise NotImplementedError

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the matrix ``[d_out, d_in]`` of a tensor of the weight's shape; a view wherever there can be one."""
        return as_matrix(weight, self.view)

    def shaped(self, matrix: Tensor) -> Tensor:
        """Return a matrix ``[d_out, d_in]`` in the shape of the weight."""
        return from_matrix(matrix, self.view, self.stored.shape)

    @property
    def merged(self) -> bool:
        """Whether the update is part of the stored weight now."""
        return self.base_weight is not None

    def share(self, other: AdaptedWeight) -> None:
        """Use the update of ``other``, which has the same stored weight: merging one of them then merges both."""
        self.factors.bindings.remove(self.binding)
        self.binding = other.binding
        together = [*(other.sharing or (other,)), self]
        for weight in together:
            weight.sharing = together

    def evaluated(self) -> tuple[Tensor, Tensor]:
        """Return (D [d_in, r], G [r, d_out]) as they are now, without dropout, in any mode and during any pass."""
        return self.factors.evaluated(self.site)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return (D [d_in, r], G [r, d_out]) of the running pass, with its dropout; differentiable."""
        return self.factors.pair(self.site, *self.factors.down_up(self.binding))

    def update(self, D: Tensor, G: Tensor) -> Tensor:
        """Return the dense update in the weight's shape and the factors' dtype; differentiable."""
        with no_autocast(D.device):
            return self.shaped((D @ G).t())

    def summed(self, W: Tensor, D: Tensor, G: Tensor) -> Tensor:
        """Return ``W`` with the update, dense, in the dtype of ``W`` and rounded once; differentiable."""
        delta = self.update(D, G)
        wide = torch.promote_types(W.dtype, delta.dtype)
        return (dequantized(W).to(wide) + delta.to(wide)).to(W.dtype)

    def batched(self, x: Tensor, W: Tensor, D: Tensor, G: Tensor) -> Tensor | None:
        """Return the products ``x[i] W[i]`` with the update of each, without building the dense sums.

        None where ``W`` is not a batch of matrices ``[d_in, d_out]``.
        """
        return None

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return the dense update ΔW in the weight's shape and the factors' dtype, without dropout: for inspection."""
        return self.update(*self.evaluated())

    @torch.no_grad()
    def merge(self, dequantize: bool = False) -> MergeLoss | None:
        """Add the update to the weight, in fp32 with one rounding; the base weight is kept, so that unmerge is exact.

        A quantized weight cannot hold such a sum. With ``dequantize`` a dense weight in its dtype takes its place until
        the update is unmerged.

        Returns:
            What rounding cost; None if the update was merged already.

        Raises:
            TypeError: the weight is quantized (or another tensor subclass), and ``dequantize`` is not set or its class
                does not say how; nothing is changed.
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
        add_update_(W, self.view, D, G)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back, bit for bit. Do nothing if nothing is merged."""
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
        """Describe the update in the words of its bank, and say whether it is merged or switched off."""
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
