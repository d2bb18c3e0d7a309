"""``EfftLinear``: a frozen ``nn.Linear`` with a tensor-train delta, and what it shares with other adapted layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from efft_kernels.nn.adapted import AdaptedWeight, MergeLoss
from efft_kernels.nn.bank import FactorBank
from efft_kernels.nn.deferred import Deferred
from efft_kernels.nn.effective import effective_property, in_pass
from efft_kernels.nn.factors import Site, TTFactors
from efft_kernels.nn.frozen import FrozenLayer, is_conv1d
from efft_kernels.nn.weights import adapted_linear, frozen_linear, stored_in

__all__ = ["AdaptedLayer", "EfftLinear", "MergeLoss", "features"]


def _reader(layer: AdaptedLayer) -> AdaptedLayer | None:
    """The layer, where reading its weight means reading the update too."""
    return layer if layer.read or in_pass(layer.binding) else None


class AdaptedLayer(FrozenLayer, AdaptedWeight):
    """A frozen layer that is called, whose weight has an update from a bank of factors.

    A shared bank is referenced, not registered: it is owned once, elsewhere.

    While the model runs, ``weight`` is the effective weight (:mod:`efft_kernels.nn.effective`) for whoever reads it, so
    that no module which never calls the layer can miss the update. At any other time it is the stored parameter, which
    :attr:`stored` always is.

    Attributes:
        read: True lets ``weight`` be the effective weight at any time: for layers that their parent never calls, so
            that parts of a model, too, are right on their own.
    """

    weight = effective_property("weight", _reader)
    __jit_unused_properties__ = ("merged", "stored", "weight")

    def __init__(self, layer: nn.Module, factors: FactorBank, site: Any, *, own_factors: bool = False) -> None:
        super().__init__(layer)
        self._check_sizes(factors, site, features(layer), type(self).__name__)
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
        if own_factors:
            self.factors = factors
        else:
            self.__dict__["factors"] = factors
        self.site, self.binding = site, factors.bind(site)
        self.enabled = True
        self.read = isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)  # by nn.MultiheadAttention
        self.register_buffer("base_weight", None, persistent=False)

    @property
    def stored(self) -> Tensor:
        """The weight that the layer owns, without the update unless it is merged."""
        return stored_in(self, "weight")

    def store(self, weight: nn.Parameter) -> None:
        self.register_parameter("weight", weight)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.describe()}"


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
        reason = cls.refusal(linear)
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


def features(weight: nn.Module | Tensor, view: str = "linear") -> tuple[int, int]:
    """(d_in, d_out) of the matrix that a layer, or a convolution over the kernel's positions, multiplies by.

    Of a parameter ``view`` says how the matrix lies in it: see :func:`efft_kernels.nn.parameter.adapt_parameter`.
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
