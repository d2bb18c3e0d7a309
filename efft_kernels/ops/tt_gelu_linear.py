"""``tt_gelu_linear``: GELU and the adapted linear layer behind it, without keeping the GELU's output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from efft_kernels import reference
from efft_kernels._autocast import autocast_like_linear, no_autocast
from efft_kernels.backends import Backend, resolve
from efft_kernels.ops._checks import check_dtypes, check_frozen, check_linear, linear_sizes
from efft_kernels.ops._flat import flat, unflat
from efft_kernels.ops._schemas import overloads

_FORWARD = overloads("tt_gelu_linear_fwd")
_BACKWARD = overloads("tt_gelu_linear_bwd")


def tt_gelu_linear(
    z: Tensor,  # [..., d_in]
    W: Tensor,  # [d_out, d_in]
    b: Tensor | None,  # [d_out]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    *,
    approximate: str = "none",
    backend: str | Backend | None = None,
) -> Tensor:  # [..., d_out]
    """``tt_linear(gelu(z), W, b, D, G)`` that keeps ``z`` for backward and makes ``gelu(z)`` again where it is needed.

    For the second layer of an MLP: GELU's own backward needs ``z`` anyway, so the widest activation of a block is no
    longer kept twice.

    Args:
        z: input of the GELU ``[..., d_in]``, any floating dtype (``cpu``: float32 or bfloat16) and strides.
        W, b: weight ``[d_out, d_in]`` and bias ``[d_out]`` or None, of one dtype (under autocast cast to its dtype);
            both frozen. The product is computed in their dtype.
        D, G: factors ``[d_in, r1]`` and ``[r1, d_out]`` as in :func:`efft_kernels.tt_linear`.
        approximate: ``"none"`` or ``"tanh"``, as in ``torch.nn.functional.gelu``.
        backend: see :mod:`efft_kernels.backends`.

    Returns:
        ``y [..., d_out]`` in the dtype of ``W`` (the autocast dtype under autocast). Differentiable with respect to
        ``z``, ``D`` and ``G``, any number of times.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes or dtypes do not fit together, ``W`` or ``b`` wants a gradient, unknown ``approximate``.
        RuntimeError: the backend asked for cannot run this call.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"tt_gelu_linear: approximate must be 'none' or 'tanh', got {approximate!r}")
    check_linear("tt_gelu_linear", "z", z, W, b, D, G)
    W, b = autocast_like_linear(W, b)
    check_dtypes("tt_gelu_linear", "W", W.dtype, b=b)
    check_frozen("tt_gelu_linear", W=W, b=b)
    chosen = resolve("tt_gelu_linear", backend, W, z, b, D, G, sizes=linear_sizes(z, W, D))
    if chosen is Backend.REFERENCE:
        return reference.tt_gelu_linear(z, W, b, D, G, approximate)
    return _TTGeluLinear.apply(z, W, b, D, G, approximate, chosen)


class _TTGeluLinear(torch.autograd.Function):
    """Autograd of tt_gelu_linear, above the backends."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        W: Tensor,
        b: Tensor | None,
        D: Tensor,
        G: Tensor,
        approximate: str,
        backend: Backend,
    ) -> Tensor:
        with no_autocast(z.device):
            y, h = _FORWARD[backend](flat(z), W, b, D, G, approximate)
        need_dz, need_dG = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
        ctx.save_for_backward(z, W if need_dz else None, h if need_dG else None, D, G)
        ctx.approximate, ctx.backend = approximate, backend
        return unflat(y, z.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        need_dz, _, _, need_dD, need_dG = needs = ctx.needs_input_grad[:5]
        z, W, h, D, G = ctx.saved_tensors
        leading, gy, z = gy.shape[:-1], flat(gy), flat(z)
        grads: tuple[Tensor | None, ...]
        with no_autocast(gy.device):
            if torch.is_grad_enabled():  # this backward will be differentiated
                grads = reference.tt_gelu_linear_bwd(gy, z, W, D, G, ctx.approximate)
            else:
                grads = _BACKWARD[ctx.backend](gy, z, W, h, D, G, ctx.approximate, need_dz, need_dD, need_dG)
        dz, dD, dG = (grad if need else None for grad, need in zip(grads, (needs[0], *needs[3:]), strict=True))
        return None if dz is None else dz.view(*leading, dz.shape[-1]), None, None, dD, dG, None, None
