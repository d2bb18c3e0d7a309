"""``EfftLinear``: a frozen ``nn.Linear`` with a tensor-train delta, and what it shares with other adapted layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from efft_kernels._autocast import no_autocast
from efft_kernels.nn.bank import FactorBank
from efft_kernels.nn.deferred import Deferred
from efft_kernels.nn.factors import Site, TTFactors
from efft_kernels.nn.frozen import FrozenLayer, cannot_wrap
from efft_kernels.nn.weights import adapted_linear, dequantized, frozen_linear, is_plain
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


class AdaptedLayer(FrozenLayer):
    """A frozen layer whose weight, as a matrix ``[d_out, d_in]``, has the update ``(D G)ᵀ`` from a bank of factors.

    A shared bank is referenced, not registered: it is owned once, elsewhere.
    """

    factors: FactorBank
    base_weight: Tensor | None

    def __init__(self, layer: nn.Module, factors: FactorBank, site: Any, *, own_factors: bool = False) -> None:
        super().__init__(layer)
        expected, sizes = factors.features(site), features(layer)
        if expected != sizes:
            raise ValueError(
                f"{type(self).__name__}: {site} of this bank fits a linear layer with (in_features, out_features) = "
                f"{expected}, got {sizes}"
            )
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
        if own_factors:
            self.factors = factors
        else:
            self.__dict__["factors"] = factors
        self.site, self.binding = site, factors.bind(site)
        self.enabled = True
        self.register_buffer("base_weight", None, persistent=False)

    @property
    def merged(self) -> bool:
        """Whether the delta is part of ``weight`` now."""
        return self.base_weight is not None

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """The dense update ΔW of the weight's shape in the factors' dtype, without dropout: for inspection."""
        D, G = self.evaluated()
        with no_autocast(D.device):
            return (D @ G).t()

    @torch.no_grad()
    def merge(self, dequantize: bool = False) -> MergeLoss | None:
        """Add the delta to ``weight``, in fp32 with one rounding, keeping the base weight so that unmerge is exact.

        A quantised weight holds no such sum: with ``dequantize`` a dense one in its dtype takes its place until then.

        Returns what rounding cost; None if the layer was merged already.

        Raises:
            TypeError: the weight is quantised (or another tensor subclass), and ``dequantize`` is not set or not known
                to it; nothing is changed.
        """
        if self.merged:
            return None
        D, G = self.evaluated()
        if is_plain(self.weight):
            kept = base = self.weight.detach().clone()
        elif dequantize:
            kept, base = self.weight.detach(), dequantized(self.weight)
            self.weight = nn.Parameter(base.clone(), requires_grad=False)
        else:
            raise TypeError(
                f"the weight is a {type(self.weight).__name__}, to which no update can be added: merge with "
                "dequantize=True (a dense weight takes its place), or keep the update beside it"
            )
        matrix = self.weight.flatten(1)  # of a convolution whose channels come last this is a copy
        tt_merge_(matrix, D, G)
        self.weight.copy_(matrix.view(self.weight.shape))
        self.base_weight, self.binding.merged = kept, True
        delta = self.delta_weight()
        wide = torch.promote_types(base.dtype, delta.dtype)
        lost = (self.weight.to(wide) - base.to(wide)) - delta
        size = delta.norm()
        return MergeLoss(
            relative_update=(size / base.to(wide).norm()).item(),
            relative_error=(lost.norm() / size).item() if size > 0 else 0.0,
        )

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back, bit for bit. Does nothing on a layer that is not merged."""
        if self.base_weight is None:
            return
        if is_plain(self.base_weight):
            self.weight.copy_(self.base_weight)
        else:
            self.weight = nn.Parameter(self.base_weight, requires_grad=False)
        self.base_weight, self.binding.merged = None, False

    def evaluated(self) -> tuple[Tensor, Tensor]:
        """(D [in_features, r], G [r, out_features]) as they are now and without dropout, whatever runs and whatever
        mode the bank is in."""
        return self.factors.evaluated(self.site)

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), self.factors.describe(self.site)]
        if self.merged:
            parts.append("merged")
        if not self.enabled:
            parts.append("disabled")
        return ", ".join(parts)


class EfftLinear(AdaptedLayer, nn.Linear):
    """``y = x Wᵀ + b + (x D) G`` with frozen ``W`` and ``b``; an ``nn.Linear`` with the same ``weight``, ``bias`` and
    hooks as the one it replaces.

    Quantised weights compute their product in their own way, and the update comes beside it.
    """

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        factors: FactorBank | None = None,
        site: Any = None,
        *,
        rank: int | tuple[int, int] = 16,
        n_cores: int = 1,
        scale: float = 1.0,
        dropout: float = 0.0,
        init: str = "v",
    ) -> EfftLinear:
        """Adapt ``linear`` (which is left as it is, but frozen).

        With ``factors`` the layer uses ``site`` of that shared bank (default: its layer 0, core 0). Without, it gets
        factors of its own, of ``rank``, with ``n_cores`` column blocks (3 for a fused qkv), ``scale``, factor
        ``dropout`` and ``init``, on the weight's device in fp32 (fp64 for an fp64 weight).

        Raises:
            TypeError: not a plain ``nn.Linear``.
            ValueError: the sizes do not fit, or settings of a bank beside ``factors``.
        """
        if factors is not None:
            if (rank, n_cores, scale, dropout, init) != (16, 1, 1.0, 0.0, "v"):
                raise ValueError("rank, n_cores, scale, dropout and init belong to the bank: set them on factors")
            if site is None and not isinstance(factors, TTFactors):
                raise ValueError(f"site must say which part of this {type(factors).__name__} the layer uses, got None")
            return cls(linear, factors, Site() if site is None else site)
        reason = cannot_wrap(linear)
        if reason is not None:
            raise TypeError(f"EfftLinear: {reason}")
        if n_cores < 1 or linear.out_features % n_cores:
            raise ValueError(f"out_features must be a multiple of n_cores, got {linear.out_features} and {n_cores}")
        own = TTFactors(
            linear.in_features,
            linear.out_features // n_cores,
            rank,
            n_cores=n_cores,
            scale=scale,
            dropout=dropout,
            init=init,
            device=linear.weight.device,
            dtype=torch.promote_types(linear.weight.dtype, torch.float32),
        )
        return cls(linear, own, Site(cores=tuple(range(n_cores))) if site is None else site, own_factors=True)

    def forward(self, x: Tensor) -> Tensor:  # [..., in_features] -> [..., out_features]
        if not self.enabled or self.merged:
            return frozen_linear(self, x)
        D, G = self.factors.down_up(self.binding)
        if isinstance(x, Deferred):
            return x.linear(self, D, G)
        return adapted_linear(self, x, D, G)


def features(layer: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of the matrix that a linear layer, or a convolution over the kernel's positions, multiplies by."""
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels // layer.groups * math.prod(layer.kernel_size), layer.out_channels
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features
