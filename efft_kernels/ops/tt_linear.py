"""Define ``tt_linear``, a frozen linear layer with a low-rank update, y = x Wᵀ + b + (x D) G."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from efft_kernels import eager, reference
from efft_kernels._arguments import (
    autocast_bias,
    autocast_like_linear,
    check_dtypes,
    check_linear,
    flatten_tokens,
    linear_sizes,
    no_autocast,
    unless_wider,
)
from efft_kernels._calls import choices, is_differentiated_forward, note_choice, signature
from efft_kernels._packed import BACKENDS, find
from efft_kernels.backends import Backend, declare, resolve


def _fake_fwd(x: Tensor, W: Tensor, b: Tensor | None, D: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    leading = x.shape[:-1]
    return x.new_empty((*leading, W.shape[0])), x.new_empty((math.prod(leading), D.shape[1]))


def _fake_bwd(
    gy: Tensor,
    x: Tensor | None,
    W: Tensor | None,
    h: Tensor | None,
    D: Tensor,
    G: Tensor,
    need_dx: bool,
    need_dD: bool,
    need_dG: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        gy.new_empty((*gy.shape[:-1], D.shape[0]) if need_dx else 0),
        D.new_empty(D.shape if need_dD else 0, dtype=torch.promote_types(D.dtype, torch.float32)),
        G.new_empty(G.shape if need_dG else 0, dtype=torch.promote_types(G.dtype, torch.float32)),
        gy.new_empty(G.shape[1] if need_db else 0, dtype=torch.promote_types(gy.dtype, torch.float32)),
    )


def _triton() -> ModuleType:
    from efft_kernels.triton import tt_linear

    return tt_linear


_FORWARD = declare(
    "tt_linear_fwd",
    # x [..., d_in], W [d_out, d_in], b [d_out], D [d_in, r1], G [r1, d_out] -> y [..., d_out], h [tokens, r1]
    "(Tensor x, Tensor W, Tensor? b, Tensor D, Tensor G) -> (Tensor y, Tensor h)",
    _fake_fwd,
    eager=eager.tt_linear_fwd,
    triton=_triton,
)
_BACKWARD = declare(
    "tt_linear_bwd",
    # gy [..., d_out], x [..., d_in], h [tokens, r1]. dD needs x, dx needs W, and dG needs h. A gradient that is not
    # needed is returned with 0 elements. dD, dG and db are at least in fp32.
    "(Tensor gy, Tensor? x, Tensor? W, Tensor? h, Tensor D, Tensor G, "
    "bool need_dx, bool need_dD, bool need_dG, bool need_db) -> (Tensor dx, Tensor dD, Tensor dG, Tensor db)",
    _fake_bwd,
    eager=eager.tt_linear_bwd,
    triton=_triton,
)


def tt_linear(
    x: Tensor,  # [..., d_in]
    W: Tensor,  # [d_out, d_in]
    b: Tensor | None,  # [d_out]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    *,
    backend: str | Backend | None = None,
) -> Tensor:  # [..., d_out]
    """Compute a linear layer plus a low-rank update, ``y = x Wᵀ + b + (x D) G``, without ever building ``D G``.

    A tensor-train update can be written in this form if a single bond connects its input side to its output side:
    multiply the cores of each side together first. For EFFT (Chen, arXiv 2311.06749), ``D`` is ``U`` and ``G`` is
    ``s·C·V`` (:func:`tt_contract`). A fused qkv projection is one call with ``d_out = 3 d`` and
    ``G = s·[C_q V | C_k V | C_v V]``.

    Under autocast ``x`` and ``W`` are cast as ``torch.nn.functional.linear`` casts them. The gradients of fp32 factors
    and of an fp32 bias stay in fp32. Only the gradients that autograd needs are computed. The op is differentiable any
    number of times.

    Args:
        x: activations ``[..., d_in]``, with any leading shape (which may contain no tokens) and any strides.
        W: weight ``[d_out, d_in]`` as in ``torch.nn.Linear``, in the dtype of ``x``.
        b: bias ``[d_out]`` or None, in the dtype of ``x``, or in fp32 if ``x`` is in half precision.
        D: down factor ``[d_in, r1]``, with any floating-point dtype that the backend supports. The product with ``D``
            is computed in the dtype of ``x``.
        G: up factor ``[r1, d_out]``, with any floating-point dtype that the backend supports.
        backend: the backend to use (see :mod:`efft_kernels.backends`).

    Returns:
        ``y [..., d_out]`` in the dtype of ``x`` (the autocast dtype under autocast).

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: shapes or dtypes do not match.
        RuntimeError: the requested backend cannot run this call, or the tensors are on different devices.
    """
    call, autocast = signature("tt_linear", backend, x, W, b, D, G)
    chosen = choices.get(call) if call is not None else None
    if chosen is None:
        check_linear("tt_linear", "x", x, W, b, D, G)
    if chosen is None or autocast is not None:
        x, W = autocast_like_linear(x, W)
        b = autocast_bias(b)
    if chosen is None:
        check_dtypes("tt_linear", "x", x.dtype, W=W, b=unless_wider(b, x.dtype))
        chosen = resolve("tt_linear", backend, W, x, b, D, G, sizes=linear_sizes(x, W, D))
        note_choice(call, chosen, x.device)
    if chosen is Backend.REFERENCE:
        return reference.tt_linear(x, W, b, D, G)
    if call is not None and not torch.is_grad_enabled() and not is_differentiated_forward():
        packed = find(chosen, x.dtype, D, G) if chosen in BACKENDS else None
        factors = (D, G) if packed is None else (packed.D, packed.G)
        y: Tensor = _FORWARD[chosen](x, W, b, *factors)[0]
        return y
    outputs = _TTLinear.apply(x, W, b, D, G, chosen)
    return outputs[0] if type(outputs) is tuple else outputs


class _TTLinear(torch.autograd.Function):
    """Define the autograd of tt_linear for all backends, with one registered operator per direction.

    If the backward pass will itself be differentiated, the reference computes it from saved tensors that are part of
    the graph. These are the inputs. If ``x`` is not saved because dD is not needed, the reference uses the saved
    ``h = x D`` instead. In this case the function returns ``h`` too, so that autograd knows how ``h`` depends on ``x``.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, D: Tensor, G: Tensor, backend: Backend
    ) -> Tensor | tuple[Tensor, Tensor]:
        packed = find(backend, x.dtype, D, G) if backend in BACKENDS else None
        factors = (D, G) if packed is None else (packed.D, packed.G)
        y, h = _FORWARD[backend](x, W, b, *factors)
        need_dx, need_dW, _, need_dD, need_dG, _ = ctx.needs_input_grad
        keep_x = need_dD or need_dW
        ctx.save_for_backward(x if keep_x else None, W if need_dx else None, h if need_dG else None, D, G)
        ctx.backend, ctx.packed, ctx.bias = backend, packed, None if b is None else b.dtype
        if need_dx and need_dG and not keep_x and not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)
            ctx.shape = y.shape
            return y, h
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, gh: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, W, h, D, G = ctx.saved_tensors
        need_dx, need_dW, need_db, need_dD, need_dG, _ = ctx.needs_input_grad
        if gy is None:
            if gh is None:
                return (None,) * 6
            gy = gh.new_zeros(ctx.shape)
        dW = None
        with no_autocast(gy.device):
            if gh is not None or torch.is_grad_enabled():  # in a second derivative, or if one will follow
                leading, gy = gy.shape[:-1], flatten_tokens(gy)
                rows = None if x is None else flatten_tokens(x)
                h = h if rows is None or h is None else rows @ D.to(rows.dtype)
                dx, dD, dG, db = reference.tt_linear_bwd(gy, rows, W, h, D, G, gh)
                dx = None if dx is None else dx.view(*leading, dx.shape[-1])
            else:
                factors = (D, G) if ctx.packed is None else (ctx.packed.D, ctx.packed.G_rows)
                dx, dD, dG, db = _BACKWARD[ctx.backend](gy, x, W, h, *factors, need_dx, need_dD, need_dG, need_db)
            if x is not None and need_dW:  # W is usually frozen; if it is trained, an ordinary product computes dW
                dW = flatten_tokens(gy).t() @ flatten_tokens(x)
        if need_dD and dD is not None and dD.dtype != D.dtype:
            dD = dD.to(D.dtype)
        if need_dG and dG is not None and dG.dtype != G.dtype:
            dG = dG.to(G.dtype)
        return (
            dx if need_dx else None,
            dW,
            db.to(ctx.bias) if need_db else None,
            dD if need_dD else None,
            dG if need_dG else None,
            None,
        )
