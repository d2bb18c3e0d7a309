"""``EfftLinear``: a frozen ``nn.Linear`` with a tensor-train update, and the base that it shares with other layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efft_kernels._arguments import no_autocast
from efft_kernels.nn.adapted import AdaptedWeight, MergeLoss, matrix_sizes
from efft_kernels.nn.bank import FactorBank
from efft_kernels.nn.effective import effective_property, in_pass
from efft_kernels.nn.factors import Site, TTFactors
from efft_kernels.nn.frozen import FrozenLayer, can_dequantize, dequantized, is_plain, stored_in
from efft_kernels.nn.producers import ProducerOutput
from efft_kernels.ops import tt_linear

__all__ = ["AdaptedLayer", "EfftLinear", "MergeLoss", "adapted_linear", "frozen_linear", "multiplies_plainly"]

torch.fx.wrap("tt_linear")  # one node of a traced graph


def _reader(layer: AdaptedLayer) -> AdaptedLayer | None:
    """Return the layer if whoever reads its weight is to read the update too, else None."""
    return layer if layer.read or in_pass(layer.binding) else None


class AdaptedLayer(FrozenLayer, AdaptedWeight):
    """A frozen layer that is called, and whose weight has an update from a bank of factors.

    The layer refers to a shared bank without registering it: the bank is owned once, elsewhere.

    While the model runs, ``weight`` is the effective weight (:mod:`efft_kernels.nn.effective`), so that a module which
    reads it and never calls the layer cannot miss the update. At any other time ``weight`` is the stored parameter,
    which :attr:`stored` always is.

    Attributes:
        read: If True, ``weight`` is the effective weight at any time. This is for layers that their parent never calls:
            a part of the model that is called alone is then right, too.
        reader: the name of the class of the module that reads the weight, if it is known.
    """

    weight = effective_property("weight", _reader)
    __jit_unused_properties__ = ("merged", "stored", "weight")

    def __init__(self, layer: nn.Module, factors: FactorBank, site: Any, *, own_factors: bool = False) -> None:
        super().__init__(layer)
        self._check_sizes(factors, site, matrix_sizes(layer), type(self).__name__)
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
        if own_factors:
            self.factors = factors
        else:
            self.__dict__["factors"] = factors
        self.site, self.binding = site, factors.bind(site)
        self.enabled = True
        self.read = isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)  # by nn.MultiheadAttention
        self.reader: str | None = None
        self.register_buffer("base_weight", None, persistent=False)

    @property
    def stored(self) -> Tensor:
        return stored_in(self, "weight")

    def store(self, weight: nn.Parameter) -> None:
        self.register_parameter("weight", weight)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.describe()}"


class EfftLinear(AdaptedLayer, nn.Linear):
    """``y = x Wᵀ + b + (x D) G`` with frozen ``W`` and ``b``.

    It is an ``nn.Linear`` with the same ``weight``, ``bias`` and hooks as the one that it replaces. A quantized weight
    computes its product in its own way, and the update is added to that.
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
        """Adapt ``linear``, which is frozen and otherwise left as it is.

        With ``factors`` the layer uses ``site`` of that shared bank (default: its layer 0, core 0). Without ``factors``
        it gets its own bank of ``rank`` with ``n_cores`` column blocks (3 for a fused qkv), ``scale``, factor
        ``dropout`` and ``init``, on the weight's device in fp32 (fp64 for an fp64 weight).

        Raises:
            TypeError: ``linear`` is not a plain ``nn.Linear``.
            ValueError: the sizes do not fit, or settings of a bank are given beside ``factors``.
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
        return adapted_linear(self, x, D, G)


def adapted_linear(linear: nn.Linear, x: Tensor, D: Tensor, G: Tensor) -> Tensor:
    """Compute ``x Wᵀ + b + (x D) G`` ``[..., d_out]`` for any frozen ``linear``.

    A plain weight is multiplied by :func:`efft_kernels.tt_linear`, or by the op that computes the producer of ``x`` too
    (:mod:`efft_kernels.nn.producers`). Any other weight computes its own product (:func:`frozen_linear`); the update is
    added to it, in the dtype of ``x`` (autocast's under autocast), without ever building ``D G``. Differentiable in
    ``x``, ``D`` and ``G``, and in the bias of ``linear`` if that is trained.

    Args:
        linear: the layer, whose weight is frozen.
        x: ``[..., d_in]``.
        D: ``[d_in, r1]``.
        G: ``[r1, d_out]``.
    """
    W, b = stored_in(linear, "weight"), linear.bias
    plain = multiplies_plainly(linear, W)
    if isinstance(x, ProducerOutput):
        if plain and not W.requires_grad:
            return x.linear(W, b, D, G)
        x = x.value()
    if plain:
        return tt_linear(x, W, b, D, G)
    return frozen_linear(linear, x) + (x @ D.to(x.dtype)) @ G.to(x.dtype)


def frozen_linear(linear: nn.Linear, x: Tensor) -> Tensor:
    """Compute ``x Wᵀ + b`` ``[..., d_out]`` for ``x`` ``[..., d_in]`` as the weight or the class of ``linear`` does.

    The gradient is that of the dequantized weight. Where the product rounds ``x`` as well (int8 or fp8 activations),
    the gradient takes that rounding for the identity.

    Raises:
        RuntimeError: ``x`` requires a gradient, and the class of ``linear`` computes the product without one.
    """
    W, forward = stored_in(linear, "weight"), _forward_of(type(linear))
    if forward is nn.Linear.forward and can_dequantize(W):
        product = F.linear if is_plain(W) else _OwnProduct.apply
        result: Tensor = product(x, W, linear.bias)
        return result
    y = forward(linear, x)
    if x.requires_grad and torch.is_grad_enabled() and not y.requires_grad:
        raise RuntimeError(
            f"a {type(W).__name__} computed its product without a gradient for its input. After a pass for inference "
            "bitsandbytes does this on CPUs with AVX512-BF16: set support_avx512bf16_for_cpu = False on its layers"
        )
    return y


class _OwnProduct(torch.autograd.Function):
    """``F.linear`` that keeps the quantized weight for backward and dequantizes it there again.

    torchao's own keeps the dense weight, and has no gradient for an ``x`` that it rounds.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(W)
        return F.linear(x, W, b)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        (W,) = ctx.saved_tensors
        need_dx, _, need_db = ctx.needs_input_grad
        with no_autocast(gy.device):
            dx = gy @ dequantized(W).to(gy.dtype) if need_dx else None
            db = gy.reshape(-1, gy.shape[-1]).sum(0) if need_db else None
        return dx, None, db


def multiplies_plainly(linear: nn.Linear, W: Tensor) -> bool:
    """Whether ``linear`` computes ``F.linear`` with its weight ``W`` and ``W`` is plain, so that a kernel can do it."""
    return is_plain(W) and _forward_of(type(linear)) is nn.Linear.forward


def _forward_of(kind: type[nn.Linear]) -> Callable[..., Tensor]:
    """Return the forward of layers of this class, or of the class that they stand in for."""
    forward: Callable[..., Tensor] = getattr(kind, "product", kind.forward)
    return forward
