"""Define ``tt_gelu_linear``, a GELU and the adapted linear layer after it, without saving the GELU's output."""

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
    check_linear,
    flatten_tokens,
    linear_sizes,
    no_autocast,
    unflatten_tokens,
    unless_wider,
)
from efft_kernels._packed import find
from efft_kernels.backends import Backend, declare, resolve


def _fake_fwd(z: Tensor, W: Tensor, b: Tensor | None, D: Tensor, G: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    return W.new_empty(z.shape[0], W.shape[0]), W.new_empty(z.shape[0], D.shape[1])


def _fake_bwd(
    gy: Tensor,
    z: Tensor,
    W: Tensor | None,
    h: Tensor | None,
    D: Tensor,
    G: Tensor,
    approximate: str,
    need_dz: bool,
    need_dD: bool,
    need_dG: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        z.new_empty(z.shape if need_dz else 0),
        D.new_empty(D.shape if need_dD else 0, dtype=torch.promote_types(D.dtype, torch.float32)),
        G.new_empty(G.shape if need_dG else 0, dtype=torch.promote_types(G.dtype, torch.float32)),
        gy.new_empty(G.shape[1] if need_db else 0, dtype=torch.promote_types(gy.dtype, torch.float32)),
    )


def _triton() -> ModuleType:
    from efft_kernels.triton import tt_gelu_linear

    return tt_gelu_linear


_FORWARD = declare(
    "tt_gelu_linear_fwd",
    # Like tt_linear_fwd on gelu(z), which is not saved for the backward pass. The dtype of z [tokens, d_in] may differ
    # from that of W, in which the product is computed.
    "(Tensor z, Tensor W, Tensor? b, Tensor D, Tensor G, str approximate) -> (Tensor y, Tensor h)",
    _fake_fwd,
    eager=eager.tt_gelu_linear_fwd,
    triton=_triton,
)
_BACKWARD = declare(
    "tt_gelu_linear_bwd",
    "(Tensor gy, Tensor z, Tensor? W, Tensor? h, Tensor D, Tensor G, str approximate, "
    "bool need_dz, bool need_dD, bool need_dG, bool need_db) -> (Tensor dz, Tensor dD, Tensor dG, Tensor db)",
    _fake_bwd,
    eager=eager.tt_gelu_linear_bwd,
    triton=_triton,
)


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
    """Compute ``tt_linear(gelu(z), W, b, D, G)``, saving ``z`` for the backward pass but not ``gelu(z)``.

    Use this op for the second layer of an MLP. The backward pass of the GELU needs ``z`` anyway, and this op recomputes
    ``gelu(z)`` from it. The widest activation of a block is therefore not stored twice.

    Args:
        z: input of the GELU ``[..., d_in]``, with any strides and any floating-point dtype that the backend supports.
        W: frozen weight ``[d_out, d_in]``. The product is computed in its dtype (in the autocast dtype under autocast).
        b: bias ``[d_out]`` or None, in the dtype of ``W``, or in fp32 if ``W`` is in half precision.
        D, G: factors ``[d_in, r1]`` and ``[r1, d_out]`` as in :func:`efft_kernels.tt_linear`.
        approximate: ``"none"`` or ``"tanh"``, as in ``torch.nn.functional.gelu``.
        backend: the backend to use (see :mod:`efft_kernels.backends`).

    Returns:
        ``y [..., d_out]`` in the dtype of ``W`` (the autocast dtype under autocast). Differentiable any number of times
        with respect to ``z``, ``b``, ``D`` and ``G``.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: shapes or dtypes do not match, ``W`` requires a gradient, or ``approximate`` is unknown.
        RuntimeError: the requested backend cannot run this call, or the tensors are on different devices.
    """
    check_approximate("tt_gelu_linear", approximate)
    check_linear("tt_gelu_linear", "z", z, W, b, D, G)
    (W,), b = autocast_like_linear(W), autocast_bias(b)
    check_dtypes("tt_gelu_linear", "W", W.dtype, b=unless_wider(b, W.dtype))
    check_frozen("tt_gelu_linear", W=W)
    chosen = resolve("tt_gelu_linear", backend, W, z, b, D, G, sizes=linear_sizes(z, W, D))
    if chosen is Backend.REFERENCE:
        return reference.tt_gelu_linear(z, W, b, D, G, approximate)
    return _TTGeluLinear.apply(z, W, b, D, G, approximate, chosen)


class _TTGeluLinear(torch.autograd.Function):
    """Define the autograd of tt_gelu_linear for all backends."""

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
        packed = find(backend, W.dtype, D, G)
        factors = (D, G) if packed is None else (packed.D, packed.G)
        with no_autocast(z.device):
            y, h = _FORWARD[backend](flatten_tokens(z), W, b, *factors, approximate)
        need_dz, need_dG = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
        ctx.save_for_backward(z, W if need_dz else None, h if need_dG else None, D, G)
        ctx.approximate, ctx.backend, ctx.packed = approximate, backend, packed
        ctx.bias = None if b is None else b.dtype
        return unflatten_tokens(y, z.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        need_dz, _, need_db, need_dD, need_dG = ctx.needs_input_grad[:5]
        needs = need_dz, need_dD, need_dG, need_db
        z, W, h, D, G = ctx.saved_tensors
        leading, gy, z = gy.shape[:-1], flatten_tokens(gy), flatten_tokens(z)
        grads: tuple[Tensor | None, ...]
        with no_autocast(gy.device):
            if torch.is_grad_enabled():  # this backward pass will be differentiated
                grads = reference.tt_gelu_linear_bwd(gy, z, W, D, G, ctx.approximate)
            else:
                factors = (D, G) if ctx.packed is None else (ctx.packed.D, ctx.packed.G_rows)
                grads = _BACKWARD[ctx.backend](gy, z, W, h, *factors, ctx.approximate, *needs)
            dz, dD, dG, db = (grad if need else None for grad, need in zip(grads, needs, strict=True))
            dtypes = D.dtype, G.dtype, ctx.bias
            dD, dG, db = (None if t is None else t.to(dtype) for t, dtype in zip((dD, dG, db), dtypes, strict=True))
        return None if dz is None else dz.view(*leading, dz.shape[-1]), None, db, dD, dG, None, None
