"""Frozen weights that are no plain dense tensors: quantised ones, as torchao's and bitsandbytes'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efft_kernels._arguments import no_autocast
from efft_kernels.ops import tt_linear

torch.fx.wrap("tt_linear")  # one node of a traced graph


def is_plain(weight: Tensor) -> bool:
    """Whether the entries of ``weight`` are in its memory as its dtype says, so that a kernel can read them."""
    # By what torch's own is_traceable_wrapper_subclass looks for, and what bitsandbytes' parameters have.
    return not hasattr(type(weight), "__tensor_flatten__") and not hasattr(type(weight), "_quantize")


def multiplies_plainly(linear: nn.Linear, W: Tensor) -> bool:
    """Whether ``linear`` is ``F.linear`` with its weight ``W``, and that is plain: kernels can do it in its place."""
    return is_plain(W) and _forward_of(type(linear)) is nn.Linear.forward


def _forward_of(kind: type[nn.Linear]) -> Callable[..., Tensor]:
    """What layers of this class compute, or those that they stand in for."""
    forward: Callable[..., Tensor] = getattr(kind, "product", kind.forward)
    return forward


def adapted_linear(linear: nn.Linear, x: Tensor, D: Tensor, G: Tensor) -> Tensor:
    """``x Wᵀ + b + (x D) G`` ``[..., d_out]`` for any frozen ``linear``.

    ``x`` is ``[..., d_in]``, ``D`` ``[d_in, r1]`` and ``G`` ``[r1, d_out]``. With a plain weight this is
    :func:`efft_kernels.tt_linear`. Another computes its own product (:func:`frozen_linear`); the update is added to it,
    computed in the dtype of ``x`` (autocast's under autocast) and without ever building ``D G``. Differentiable in
    ``x``, ``D``, ``G``.
    """
    W = stored_in(linear, "weight")
    if multiplies_plainly(linear, W):
        return tt_linear(x, W, linear.bias, D, G)
    return frozen_linear(linear, x) + (x @ D.to(x.dtype)) @ G.to(x.dtype)


def frozen_linear(linear: nn.Linear, x: Tensor) -> Tensor:
    """``x Wᵀ + b`` ``[..., d_out]`` for ``x`` ``[..., d_in]``, as the weight or the class of ``linear`` computes it.

    The gradient is that of the dequantised weight, also where the product rounds ``x`` as well (int8 or fp8
    activations), for which the rounding then counts as the identity.

    Raises:
        RuntimeError: the class of ``linear`` computes a product without the gradient that ``x`` asks for.
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
            "bitsandbytes does so on CPUs with AVX512-BF16: set support_avx512bf16_for_cpu = False on its layers"
        )
    return y


class _OwnProduct(torch.autograd.Function):
    """``F.linear`` that keeps the weight as it is for backward, where it is dequantised anew. torchao's own keeps the
    dense one, and where it rounds ``x`` has no gradient for it."""

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


def can_dequantize(weight: Tensor) -> bool:
    """Whether ``weight`` is plain, or its class says how to make it dense."""
    return is_plain(weight) or type(weight).dequantize is not Tensor.dequantize


def dequantized(weight: Tensor) -> Tensor:
    """The dense values of ``weight`` ``[d_out, d_in]`` in its dtype; a plain weight itself.

    Raises:
        TypeError: a class that does not say how to make it dense, as bitsandbytes'.
    """
    if is_plain(weight):
        return weight
    if not can_dequantize(weight):
        raise TypeError(
            f"expected a weight whose class has dequantize(), as torchao's, got a {type(weight).__name__}: load the "
            "adapter onto the dense base for dense weights"
        )
    dense: Tensor = getattr(weight, "get_original_weight", weight.dequantize)()  # NF4Tensor's dequantize is another's
    return dense.to(weight.dtype)


def stored_in(module: nn.Module, name: str) -> Tensor:
    """What ``module`` owns under the name of an adapted parameter, past the property that stands before it.

    Raises:
        AttributeError: nothing.
    """
    W = module._parameters.get(name)
    if W is None:  # pruned, or of a module that FSDP has flattened: a plain tensor is set in the place of the parameter
        W = module.__dict__.get(name)
    if W is None:  # parametrized: the property is torch's
        W = getattr(module, name)
    return cast(Tensor, W)
