"""Define ``tt_mlp``, an MLP of two adapted linear layers with a GELU between them, optionally after a layer norm."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from efft_kernels import eager, reference
from efft_kernels._arguments import (
    autocast_bias,
    autocast_like_linear,
    check_approximate,
    check_dtypes,
    check_frozen,
    check_layer,
    check_linear,
    check_norm,
    check_number,
    linear_sizes,
    no_autocast,
    rows_of,
    unflatten_tokens,
    unless_wider,
)
from efft_kernels._calls import choices, note_choice, signature
from efft_kernels._packed import find
from efft_kernels.backends import Backend, declare, resolve


def _fake_fwd(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float | None,
    W1: Tensor,
    b1: Tensor | None,
    D1: Tensor,
    G1: Tensor,
    W2: Tensor,
    b2: Tensor | None,
    D2: Tensor,
    G2: Tensor,
    approximate: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens = x.shape[0]
    y, z = W2.new_empty(tokens, W2.shape[0]), W1.new_empty(tokens, W1.shape[0])
    h1, h2 = W1.new_empty(tokens, D1.shape[1]), W2.new_empty(tokens, D2.shape[1])
    statistics = 0 if eps is None else tokens
    mean, rstd = (x.new_empty(statistics, dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2))
    return y, z, h1, h2, mean, rstd


def _fake_bwd(
    gy: Tensor,
    x: Tensor,
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float | None,
    mean: Tensor,
    rstd: Tensor,
    W1: Tensor | None,
    W2: Tensor | None,
    h1: Tensor | None,
    h2: Tensor | None,
    D1: Tensor,
    G1: Tensor,
    D2: Tensor,
    G2: Tensor,
    approximate: str,
    need_dx: bool,
    need_dD1: bool,
    need_dG1: bool,
    need_db1: bool,
    need_dD2: bool,
    need_dG2: bool,
    need_db2: bool,
    need_dgamma: bool,
    need_dbeta: bool,
) -> tuple[Tensor, ...]:
    def wide(like: Tensor, *shape: int, need: bool) -> Tensor:
        return like.new_empty(shape if need else 0, dtype=torch.promote_types(like.dtype, torch.float32))

    return (
        x.new_empty(x.shape if need_dx else 0),
        wide(D1, *D1.shape, need=need_dD1),
        wide(G1, *G1.shape, need=need_dG1),
        wide(z, G1.shape[1], need=need_db1),
        wide(D2, *D2.shape, need=need_dD2),
        wide(G2, *G2.shape, need=need_dG2),
        wide(gy, G2.shape[1], need=need_db2),
        (x if gamma is None else gamma).new_empty(x.shape[1] if need_dgamma else 0),
        (x if beta is None else beta).new_empty(x.shape[1] if need_dbeta else 0),
    )


def _triton() -> ModuleType:
    from efft_kernels.triton import tt_mlp

    return tt_mlp


_FORWARD = declare(
    "tt_mlp_fwd",
    # x is [tokens, d_in]. Without eps, there is no norm: gamma and beta are None, x has the dtype of W1, and mean and
    # rstd have 0 elements. z [tokens, d_hidden] is the input of the GELU in the dtype of W1, h1 [tokens, r1] is the
    # product of the norm's output with D1, and h2 [tokens, r1] is the product of gelu(z) with D2.
    "(Tensor x, Tensor? gamma, Tensor? beta, float? eps, Tensor W1, Tensor? b1, Tensor D1, Tensor G1, Tensor W2, "
    "Tensor? b2, Tensor D2, Tensor G2, str approximate) "
    "-> (Tensor y, Tensor z, Tensor h1, Tensor h2, Tensor mean, Tensor rstd)",
    _fake_fwd,
    eager=eager.tt_mlp_fwd,
    triton=_triton,
)
_BACKWARD = declare(
    "tt_mlp_bwd",
    # dx, dgamma and dbeta need W1. They and dD1, dG1 and db1 need W2. dG1 needs h1, and dG2 needs h2. The gradients of
    # factors and biases are at least in fp32, and dgamma and dbeta are in the dtypes of gamma and beta. A gradient that
    # is not needed has 0 elements.
    "(Tensor gy, Tensor x, Tensor z, Tensor? gamma, Tensor? beta, float? eps, Tensor mean, Tensor rstd, Tensor? W1, "
    "Tensor? W2, Tensor? h1, Tensor? h2, Tensor D1, Tensor G1, Tensor D2, Tensor G2, str approximate, bool need_dx, "
    "bool need_dD1, bool need_dG1, bool need_db1, bool need_dD2, bool need_dG2, bool need_db2, bool need_dgamma, "
    "bool need_dbeta) -> (Tensor dx, Tensor dD1, Tensor dG1, Tensor db1, Tensor dD2, Tensor dG2, Tensor db2, "
    "Tensor dgamma, Tensor dbeta)",
    _fake_bwd,
    eager=eager.tt_mlp_bwd,
    triton=_triton,
)


def tt_mlp(
    x: Tensor,  # [..., d_in]
    W1: Tensor,  # [d_hidden, d_in]
    b1: Tensor | None,  # [d_hidden]
    D1: Tensor,  # [d_in, r1]
    G1: Tensor,  # [r1, d_hidden]
    W2: Tensor,  # [d_out, d_hidden]
    b2: Tensor | None,  # [d_out]
    D2: Tensor,  # [d_hidden, r1]
    G2: Tensor,  # [r1, d_out]
    *,
    gamma: Tensor | None = None,  # [d_in]
    beta: Tensor | None = None,  # [d_in]
    eps: float | None = None,
    approximate: str = "none",
    backend: str | Backend | None = None,
) -> Tensor:  # [..., d_out]
    """Compute ``tt_linear(gelu(z), W2, b2, D2, G2)`` with ``z = tt_linear(n, W1, b1, D1, G1)`` as one op.

    ``n`` is ``layer_norm(x, gamma, beta, eps)`` if ``eps`` is given, else ``x``. The op saves ``x``, ``z`` and the two
    products of rank r1 for the backward pass. It saves neither ``gelu(z)`` nor the output of the norm, which the
    backward pass computes again.

    Args:
        x: input ``[..., d_in]``, with any strides. With a norm, it may have any floating-point dtype that the backend
            supports. Without a norm, it must have the dtype of ``W1``.
        W1, W2: frozen weights ``[d_hidden, d_in]`` and ``[d_out, d_hidden]`` of one dtype, in which the products are
            computed. Under autocast, they are cast to the autocast dtype, and so is ``x`` if there is no norm. The norm
            and the GELU are computed in fp32 (fp64 for fp64) and rounded once to this dtype, and ``z`` is rounded to
            it.
        b1, b2: biases ``[d_hidden]`` and ``[d_out]`` or None, in the dtype of the weights, or in fp32 if the weights
            are in half precision.
        D1, G1, D2, G2: factors ``[d_in, r1]``, ``[r1, d_hidden]``, ``[d_hidden, r1]`` and ``[r1, d_out]`` as in
            :func:`efft_kernels.tt_linear`. The two layers may have different ranks.
        gamma, beta: the norm's weight and bias ``[d_in]``, each of which may be None. They must have the same dtype,
            which may differ from those of ``x`` and ``W1``. They must be None if ``eps`` is None.
        eps: number added to the variance of the norm. None if there is no norm.
        approximate: ``"none"`` or ``"tanh"``, as in ``torch.nn.functional.gelu``.
        backend: the backend to use (see :mod:`efft_kernels.backends`).

    Returns:
        ``y [..., d_out]`` in the dtype of ``W2`` (the autocast dtype under autocast). Differentiable any number of
        times with respect to all arguments except ``W1`` and ``W2``.

    Raises:
        TypeError: an argument is not a tensor, or ``eps`` is not a number.
        ValueError: shapes or dtypes do not match, ``W1`` or ``W2`` requires a gradient, ``approximate`` is unknown, or
            ``gamma`` or ``beta`` is given without ``eps``.
        RuntimeError: the requested backend cannot run this call, or the tensors are on different devices.
    """
    check_approximate("tt_mlp", approximate)
    if eps is not None:
        check_number("tt_mlp", "eps", eps)
    tensors = gamma, beta, W1, b1, D1, G1, W2, b2, D2, G2
    call, autocast = signature("tt_mlp", backend, x, *tensors, setting=eps is None)
    chosen = choices.get(call) if call is not None else None
    if chosen is None:
        _check_shapes(x, gamma, beta, eps is None, W1, b1, D1, G1, W2, b2, D2, G2)
    if chosen is None or autocast is not None:
        W1, W2 = autocast_like_linear(W1, W2)
        if eps is None:
            (x,) = autocast_like_linear(x)
        b1, b2 = autocast_bias(b1), autocast_bias(b2)
    if chosen is None:
        biases = {name: unless_wider(b, W1.dtype) for name, b in (("b1", b1), ("b2", b2))}
        if eps is None:
            check_dtypes("tt_mlp", "W1", W1.dtype, x=x)
        check_dtypes("tt_mlp", "W1", W1.dtype, W2=W2, **biases)
    if W1.requires_grad or W2.requires_grad:
        check_frozen("tt_mlp", W1=W1, W2=W2)
    if chosen is None:
        tensors = gamma, beta, W1, b1, D1, G1, W2, b2, D2, G2
        sizes = linear_sizes(x, W2, D2)
        chosen = resolve("tt_mlp", backend, W1, x, *tensors, sizes=sizes, measured="tt_gelu_linear")
        note_choice(call, chosen, x.device)
    if chosen is Backend.REFERENCE:
        return reference.tt_mlp(x, gamma, beta, eps, W1, b1, D1, G1, W2, b2, D2, G2, approximate)
    return _TTMlp.apply(x, gamma, beta, W1, b1, D1, G1, W2, b2, D2, G2, eps, approximate, chosen)


def _check_shapes(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    is_plain: bool,
    W1: Tensor,
    b1: Tensor | None,
    D1: Tensor,
    G1: Tensor,
    W2: Tensor,
    b2: Tensor | None,
    D2: Tensor,
    G2: Tensor,
) -> None:
    """Raise an error unless the shapes match, and the arguments of the norm match each other and ``is_plain``.

    ``is_plain`` says that there is no norm.
    """
    check_linear("tt_mlp", "x", x, W1, b1, D1, G1, layer="1")
    check_layer("tt_mlp", W2, b2, D2, G2, layer="2")
    if W2.shape[1] != W1.shape[0]:
        raise ValueError(f"tt_mlp: W2 must be [d_out, d_hidden={W1.shape[0]}], got shape {list(W2.shape)}")
    given = [name for name, parameter in (("gamma", gamma), ("beta", beta)) if parameter is not None]
    if is_plain and given:
        raise ValueError(
            f"tt_mlp: without eps there is no norm, got {' and '.join(given)}; pass eps, or leave them out"
        )
    check_norm("tt_mlp", x, gamma, beta)


class _TTMlp(torch.autograd.Function):
    """Define the autograd of tt_mlp for all backends.

    If the backward pass will itself be differentiated, the reference computes it from the inputs, and computes z again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        W1: Tensor,
        b1: Tensor | None,
        D1: Tensor,
        G1: Tensor,
        W2: Tensor,
        b2: Tensor | None,
        D2: Tensor,
        G2: Tensor,
        eps: float | None,
        approximate: str,
        backend: Backend,
    ) -> Tensor:
        packed = find(backend, W1.dtype, D1, G1), find(backend, W1.dtype, D2, G2)
        first = (D1, G1) if packed[0] is None else (packed[0].D, packed[0].G)
        second = (D2, G2) if packed[1] is None else (packed[1].D, packed[1].G)
        with no_autocast(x.device):
            y, z, h1, h2, mean, rstd = _FORWARD[backend](
                rows_of(x), gamma, beta, eps, W1, b1, *first, W2, b2, *second, approximate
            )
        needs = ctx.needs_input_grad
        need_z = any(needs[:7])
        ctx.save_for_backward(
            *(x, z, gamma, beta, mean, rstd),
            *((W1, b1, W2) if need_z else (None, None, None)),
            *(h1 if needs[6] else None, h2 if needs[10] else None, D1, G1, D2, G2),
        )
        ctx.eps, ctx.approximate, ctx.backend, ctx.packed = eps, approximate, backend, packed
        ctx.biases = None if b1 is None else b1.dtype, None if b2 is None else b2.dtype
        return unflatten_tokens(y, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, gamma, beta, mean, rstd, W1, b1, W2, h1, h2, D1, G1, D2, G2 = ctx.saved_tensors
        need_dx, need_dgamma, need_dbeta, _, need_db1, need_dD1, need_dG1, _, need_db2, need_dD2, need_dG2 = (
            ctx.needs_input_grad[:11]
        )
        needs = need_dx, need_dD1, need_dG1, need_db1, need_dD2, need_dG2, need_db2, need_dgamma, need_dbeta
        leading, gy, rows = gy.shape[:-1], rows_of(gy), rows_of(x)
        norm = gamma, beta, ctx.eps
        grads: tuple[Tensor | None, ...]
        with no_autocast(gy.device):
            if torch.is_grad_enabled():  # this backward pass will be differentiated
                grads = reference.tt_mlp_bwd(gy, rows, z, *norm, W1, b1, W2, D1, G1, D2, G2, ctx.approximate)
            else:
                packed = ctx.packed
                first = (D1, G1) if packed[0] is None else (packed[0].D, packed[0].G_rows)
                second = (D2, G2) if packed[1] is None else (packed[1].D, packed[1].G_rows)
                grads = _BACKWARD[ctx.backend](
                    *(gy, rows, z, *norm, mean, rstd, W1, W2, h1, h2, *first, *second, ctx.approximate), *needs
                )
            dtypes = (
                *(x.dtype, D1.dtype, G1.dtype, ctx.biases[0], D2.dtype, G2.dtype, ctx.biases[1]),
                *(None if gamma is None else gamma.dtype, None if beta is None else beta.dtype),
            )
            dx, dD1, dG1, db1, dD2, dG2, db2, dgamma, dbeta = [  # a generator would take longer
                None if grad is None or not need else grad if grad.dtype == dtype else grad.to(dtype)
                for grad, need, dtype in zip(grads, needs, dtypes, strict=True)
            ]
        if dx is not None and dx.shape != x.shape:
            dx = dx.view(*leading, dx.shape[-1])
        return dx, dgamma, dbeta, None, db1, dD1, dG1, None, db2, dD2, dG2, None, None, None
