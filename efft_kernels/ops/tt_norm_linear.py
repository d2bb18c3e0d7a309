"""Define ``tt_norm_linear``, a layer norm and the adapted linear layer after it, without saving the norm's output."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from efft_kernels import eager, reference
from efft_kernels._arguments import (
    autocast_bias,
    autocast_like_linear,
    check_dtypes,
    check_frozen,
    check_linear,
    check_norm,
    check_number,
    flatten_tokens,
    linear_sizes,
    no_autocast,
    unflatten_tokens,
    unless_wider,
)
from efft_kernels._packed import find
from efft_kernels.backends import Backend, declare, resolve


def _fake_fwd(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    W: Tensor,
    b: Tensor | None,
    D: Tensor,
    G: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2))
    return W.new_empty(x.shape[0], W.shape[0]), W.new_empty(x.shape[0], D.shape[1]), mean, rstd


def _fake_bwd(
    gy: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    mean: Tensor,
    rstd: Tensor,
    W: Tensor | None,
    h: Tensor | None,
    D: Tensor,
    G: Tensor,
    need_dx: bool,
    need_dD: bool,
    need_dG: bool,
    need_db: bool,
    need_dgamma: bool,
    need_dbeta: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_dx else 0),
        D.new_empty(D.shape if need_dD else 0, dtype=torch.promote_types(D.dtype, torch.float32)),
        G.new_empty(G.shape if need_dG else 0, dtype=torch.promote_types(G.dtype, torch.float32)),
        gy.new_empty(G.shape[1] if need_db else 0, dtype=torch.promote_types(gy.dtype, torch.float32)),
        (x if gamma is None else gamma).new_empty(x.shape[1] if need_dgamma else 0),
        (x if beta is None else beta).new_empty(x.shape[1] if need_dbeta else 0),
    )


def _triton() -> ModuleType:
    from efft_kernels.triton import tt_norm_linear

    return tt_norm_linear


_FORWARD = declare(
    "tt_norm_linear_fwd",
    # Like tt_linear_fwd on the layer norm of x over d_in. gamma and beta are [d_in]. mean and rstd are [tokens], in
    # fp32 (fp64 for an fp64 x); rstd is 1 / sqrt(variance + eps).
    "(Tensor x, Tensor? gamma, Tensor? beta, float eps, Tensor W, Tensor? b, Tensor D, Tensor G) "
    "-> (Tensor y, Tensor h, Tensor mean, Tensor rstd)",
    _fake_fwd,
    eager=eager.tt_norm_linear_fwd,
    triton=_triton,
)
_BACKWARD = declare(
    "tt_norm_linear_bwd",
    # dx, dgamma and dbeta need W; dgamma and dbeta are in the dtypes of gamma and beta.
    "(Tensor gy, Tensor x, Tensor? gamma, Tensor? beta, float eps, Tensor mean, Tensor rstd, Tensor? W, Tensor? h, "
    "Tensor D, Tensor G, bool need_dx, bool need_dD, bool need_dG, bool need_db, bool need_dgamma, bool need_dbeta) "
    "-> (Tensor dx, Tensor dD, Tensor dG, Tensor db, Tensor dgamma, Tensor dbeta)",
    _fake_bwd,
    eager=eager.tt_norm_linear_bwd,
    triton=_triton,
)


def tt_norm_linear(
    x: Tensor,  # [..., d_in]
    gamma: Tensor | None,  # [d_in]
    beta: Tensor | None,  # [d_in]
    W: Tensor,  # [d_out, d_in]
    b: Tensor | None,  # [d_out]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    *,
    eps: float = 1e-5,
    backend: str | Backend | None = None,
) -> Tensor:  # [..., d_out]
    """Compute ``tt_linear(layer_norm(x, gamma, beta, eps), W, b, D, G)`` without saving the output of the norm.

    Use this op for the first layer of an attention or MLP block. There ``x`` is the residual stream, which the backward
    pass of the norm needs anyway. The op saves ``x``, and its backward pass recomputes the output of the norm.

    Args:
        x: input of the norm ``[..., d_in]``, with any strides and any floating-point dtype that the backend supports.
        gamma, beta: the norm's weight and bias ``[d_in]``, each of which may be None. They must have the same dtype,
            which may differ from those of ``x`` and ``W``.
        W: frozen weight ``[d_out, d_in]``. The norm is computed in fp32 (fp64 for fp64) and rounded once to the dtype
            of ``W``, in which the product is computed. Under autocast, ``W`` is cast to the autocast dtype.
        b: bias ``[d_out]`` or None, in the dtype of ``W``, or in fp32 if ``W`` is in half precision.
        D, G: factors ``[d_in, r1]`` and ``[r1, d_out]`` as in :func:`efft_kernels.tt_linear`.
        eps: number added to the variance.
        backend: the backend to use (see :mod:`efft_kernels.backends`).

    Returns:
        ``y [..., d_out]`` in the dtype of ``W`` (the autocast dtype under autocast). Differentiable any number of times
        with respect to ``x``, ``gamma``, ``beta``, ``b``, ``D`` and ``G``.

    Raises:
        TypeError: an argument is not a tensor, or ``eps`` is not a number.
        ValueError: shapes or dtypes do not match, or ``W`` requires a gradient.
        RuntimeError: the requested backend cannot run this call, or the tensors are on different devices.
    """
    check_linear("tt_norm_linear", "x", x, W, b, D, G)
    check_number("tt_norm_linear", "eps", eps)
    (W,), b = autocast_like_linear(W), autocast_bias(b)
    check_dtypes("tt_norm_linear", "W", W.dtype, b=unless_wider(b, W.dtype))
    check_norm("tt_norm_linear", x, gamma, beta)
    check_frozen("tt_norm_linear", W=W)
    chosen = resolve("tt_norm_linear", backend, W, x, gamma, beta, b, D, G, sizes=linear_sizes(x, W, D))
    if chosen is Backend.REFERENCE:
        return reference.tt_norm_linear(x, gamma, beta, W, b, D, G, eps)
    return _TTNormLinear.apply(x, gamma, beta, W, b, D, G, eps, chosen)


class _TTNormLinear(torch.autograd.Function):
    """Define the autograd of tt_norm_linear for all backends."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        W: Tensor,
        b: Tensor | None,
        D: Tensor,
        G: Tensor,
        eps: float,
        backend: Backend,
    ) -> Tensor:
        packed = find(backend, W.dtype, D, G)
        factors = (D, G) if packed is None else (packed.D, packed.G)
        with no_autocast(x.device):
            y, h, mean, rstd = _FORWARD[backend](flatten_tokens(x), gamma, beta, eps, W, b, *factors)
        need_W, need_dG = any(ctx.needs_input_grad[:3]), ctx.needs_input_grad[6]
        ctx.save_for_backward(x, gamma, beta, mean, rstd, W if need_W else None, h if need_dG else None, D, G)
        ctx.eps, ctx.backend, ctx.packed, ctx.bias = eps, backend, packed, None if b is None else b.dtype
        return unflatten_tokens(y, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, mean, rstd, W, h, D, G = ctx.saved_tensors
        need_dx, need_dgamma, need_dbeta, _, need_db, need_dD, need_dG = ctx.needs_input_grad[:7]
        needs = need_dx, need_dD, need_dG, need_db, need_dgamma, need_dbeta
        leading, gy, x = gy.shape[:-1], flatten_tokens(gy), flatten_tokens(x)
        grads: tuple[Tensor | None, ...]
        with no_autocast(gy.device):
            if torch.is_grad_enabled():  # this backward pass will be differentiated
                grads = reference.tt_norm_linear_bwd(gy, x, gamma, beta, W, D, G, ctx.eps)
            else:
                factors = (D, G) if ctx.packed is None else (ctx.packed.D, ctx.packed.G_rows)
                grads = _BACKWARD[ctx.backend](gy, x, gamma, beta, ctx.eps, mean, rstd, W, h, *factors, *needs)
            dx, *rest = (grad if need else None for grad, need in zip(grads, needs, strict=True))
            of_norm = (None if parameter is None else parameter.dtype for parameter in (gamma, beta))
            dtypes = D.dtype, G.dtype, ctx.bias, *of_norm
            dD, dG, db, dgamma, dbeta = (
                None if grad is None else grad.to(dtype) for grad, dtype in zip(rest, dtypes, strict=True)
            )
        dx = None if dx is None else dx.view(*leading, dx.shape[-1])
        return dx, dgamma, dbeta, None, db, dD, dG, None, None
