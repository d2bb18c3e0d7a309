"""tt_linear on the layer norm of x; backward makes the norm's output again from x instead of keeping it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from efft_kernels.backends import Backend
from efft_kernels.eager.tt_linear import linear_bwd, linear_fwd
from efft_kernels.ops._schemas import implement


def _tt_norm_linear_fwd(
    x: Tensor,  # [tokens, d_in]
    gamma: Tensor | None,  # [d_in]
    beta: Tensor | None,  # [d_in]
    eps: float,
    W: Tensor,  # [d_out, d_in]
    b: Tensor | None,  # [d_out]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # y [tokens, d_out], h [tokens, r1], mean and rstd [tokens]
    n, mean, rstd = _layer_norm(x, gamma, beta, eps, W.dtype)
    y, h = linear_fwd(n.to(W.dtype), W, b, D, G)
    wide = torch.promote_types(x.dtype, torch.float32)
    return y, h, mean.to(wide).flatten(), rstd.to(wide).flatten()


def _tt_norm_linear_bwd(
    gy: Tensor,  # [tokens, d_out]
    x: Tensor,  # [tokens, d_in]
    gamma: Tensor | None,  # [d_in]
    beta: Tensor | None,  # [d_in]
    eps: float,
    mean: Tensor,  # [tokens]
    rstd: Tensor,  # [tokens]
    W: Tensor | None,  # [d_out, d_in]
    h: Tensor | None,  # [tokens, r1]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    need_dx: bool,
    need_dD: bool,
    need_dG: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n = _layer_norm(x, gamma, beta, eps, gy.dtype)[0].to(gy.dtype) if need_dD else None
    dn, dD, dG = linear_bwd(gy, n, W, h, D, G, need_dx, need_dD, need_dG)
    return layer_norm_bwd(dn, x, gamma, beta, mean, rstd) if need_dx else x.new_empty(0), dD, dG


def layer_norm_bwd(
    dn: Tensor,  # [tokens, d_in]
    x: Tensor,  # [tokens, d_in]
    gamma: Tensor | None,  # [d_in]
    beta: Tensor | None,  # [d_in]
    mean: Tensor,  # [tokens]
    rstd: Tensor,  # [tokens]
) -> Tensor:  # [tokens, d_in], dtype of x
    """dx of a layer norm by the vendor's kernel, which wants everything in one dtype but the statistics."""
    wide, gamma, beta = _alike(x, gamma, beta, dn.dtype)
    if x.device.type == "cpu":
        mean, rstd = mean.to(wide.dtype), rstd.to(wide.dtype)
    statistics = (mean[:, None], rstd[:, None])
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        dn.to(wide.dtype), wide, x.shape[1:], *statistics, gamma, beta, [True, False, False]
    )
    return dx.to(x.dtype)


def _layer_norm(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, to be rounded to ``dtype``, and its statistics."""
    wide, gamma, beta = _alike(x, gamma, beta, dtype)
    return torch.native_layer_norm(wide, x.shape[1:], gamma, beta, eps)


def _alike(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """All in the one dtype that the vendor's kernel wants; it rounds its result to that, so it holds ``dtype``."""
    others = {dtype, *(parameter.dtype for parameter in (gamma, beta) if parameter is not None)}
    if others == {x.dtype}:
        return x, gamma, beta
    dtype = functools.reduce(torch.promote_types, others, x.dtype)
    gamma, beta = (None if parameter is None else parameter.to(dtype) for parameter in (gamma, beta))
    return x.to(dtype), gamma, beta


implement("tt_norm_linear_fwd", Backend.EAGER, _tt_norm_linear_fwd)
implement("tt_norm_linear_bwd", Backend.EAGER, _tt_norm_linear_bwd)
