"""Define ``EfftLinear``, a frozen ``nn.Linear`` with a tensor-train update, and the base class for adapted layers."""

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

torch.fx.wrap("tt_linear")  # a traced graph contains tt_linear as one node


def _reader(layer: AdaptedLayer) -> AdaptedLayer | None:
    """Return the layer if a read of its weight must include the update, else None."""
    return layer if layer.read or in_pass(layer.binding) else None


class AdaptedLayer(FrozenLayer, AdaptedWeight):
    """Replace a layer that the model calls by a frozen layer whose weight has an update from a bank of factors.

    A bank is the module that owns the trained factors of many layers. The layer refers to the bank without registering
    it as a submodule, because another module owns the bank. With ``own_factors``, the layer registers it.

    While the model runs, ``weight`` is the effective weight, which includes the update
    (:mod:`efft_kernels.nn.effective`). A module that reads ``weight`` without calling the layer therefore cannot miss
    the update. At other times ``weight`` is the stored parameter; :attr:`stored` always returns the stored parameter.

    Attributes:
        read: whether ``weight`` is always the effective weight. This is the case for layers whose parent reads the
            weight and never calls the layer. The result is then also correct if only a part of the model is called.
        reader: the class name of the module that reads the weight, or None if no such module is known.
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
        # nn.MultiheadAttention uses this class for its out_proj and reads the weight.
        self.read = isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)
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
    """Compute ``y = x Wᵀ + b + (x D) G`` with frozen ``W`` and ``b``.

    This is an ``nn.Linear`` with the same ``weight``, ``bias`` and hooks as the layer that it replaces. The class of a
    quantized weight computes the product with that weight, and the layer adds the update to the result.
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
        """Adapt ``linear``: freeze it, and return the adapted layer that replaces it.

        With ``factors``, the layer uses ``site`` of that shared bank. For a :class:`TTFactors`, the default site is
        layer 0 and core 0; any other bank needs a site. Without ``factors``, the layer gets its own bank of rank
        ``rank`` with ``n_cores`` column blocks (3 for a fused qkv), ``scale``, factor ``dropout`` and ``init``. The
        bank is on the weight's device in fp32, or in fp64 for an fp64 weight.

        Raises:
            TypeError: ``linear`` cannot be replaced; the message states the reason.
            ValueError: the sizes do not match, ``site`` is missing, or settings of a bank are passed together with
                ``factors``.
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
        binding = self.binding
        if not self.enabled or binding.merged:
            return frozen_linear(self, x)
        D, G = self.factors.down_up(binding)
        return adapted_linear(self, x, D, G)


def adapted_linear(linear: nn.Linear, x: Tensor, D: Tensor, G: Tensor) -> Tensor:
    """Compute ``x Wᵀ + b + (x D) G`` ``[..., d_out]`` for any frozen ``linear``.

    A plain weight is multiplied by :func:`efft_kernels.tt_linear`. If ``x`` is the postponed output of a GELU or a
    LayerNorm (:mod:`efft_kernels.nn.producers`), the op that also computes that module is used instead. For any other
    weight, :func:`frozen_linear` computes the product, and the update is added to the product in the dtype of ``x``
    (the autocast dtype under autocast), without ever building ``D G``. The result is differentiable with respect to
    ``x``, ``D``, ``G`` and the bias of ``linear``.

    Args:
        linear: the layer, whose weight is frozen.
        x: ``[..., d_in]``.
        D: ``[d_in, r1]``.
        G: ``[r1, d_out]``.
    """
    W = stored_in(linear, "weight")
    # nn.Module looks up linear.bias more slowly. A property of the class, if there is one, replaces the parameter.
    b = linear.bias if hasattr(type(linear), "bias") else linear._parameters.get("bias")
    plain = multiplies_plainly(linear, W)
    if isinstance(x, ProducerOutput):
        if plain and not W.requires_grad:
            return x.linear(W, b, D, G)
        x = x.value()
    if plain:
        return tt_linear(x, W, b, D, G)
    return frozen_linear(linear, x) + (x @ D.to(x.dtype)) @ G.to(x.dtype)


def frozen_linear(linear: nn.Linear, x: Tensor) -> Tensor:
    """Compute ``x Wᵀ + b`` ``[..., d_out]`` for ``x`` ``[..., d_in]`` as the class of the weight or the layer does.

    The gradient is that of the dequantized weight. If the product also rounds ``x`` (int8 or fp8 activations), the
    gradient treats that rounding as the identity.

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
            f"a {type(W).__name__} computed its product without a gradient for its input. Layers of bitsandbytes do "
            "this on CPUs with AVX512-BF16 after inference: set support_avx512bf16_for_cpu = False on these layers"
        )
    return y


class _OwnProduct(torch.autograd.Function):
    """Compute ``F.linear``, save the quantized weight for the backward pass, and dequantize it again there.

    torchao's own product saves the dense weight, and computes no gradient for ``x`` if the product rounds ``x``.
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
    """Return whether ``linear`` computes ``F.linear`` with a dense weight ``W``, so that a kernel can compute it."""
    kind = type(linear)  # _forward_of is written out here, because every call of a layer comes here
    return is_plain(W) and getattr(kind, "product", kind.forward) is nn.Linear.forward


def _forward_of(kind: type[nn.Linear]) -> Callable[..., Tensor]:
    """Return the forward method of layers of this class, or of the class that a stand-in replaced."""
    forward: Callable[..., Tensor] = getattr(kind, "product", kind.forward)
    return forward
