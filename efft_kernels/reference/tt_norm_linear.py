"""y = n Wᵀ + b + (n D) G with n = (x - mean(x)) / sqrt(var(x) + eps) · gamma + beta, and its gradients, as the
formulas stand."""

from __future__ import annotations

import torch
from torch import Tensor

from efft_kernels._autocast import no_autocast
from efft_kernels.reference._precision import wide
from efft_kernels.reference.tt_linear import tt_linear, tt_linear_bwd


def tt_norm_linear(
    x: Tensor,  # [..., d_in]
    gamma: Tensor | None,  # [d_in]
    beta: Tensor | None,  # [d_in]
    W: Tensor,  # [d_out, d_in]
    b: Tensor | None,  # [d_out]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    eps: float,
) -> Tensor:  # [..., d_out], dtype of W
    with no_autocast(x.device):
        n, _ = _standardized(x.to(_wide(x, gamma, beta)), eps)
        return tt_linear(_scaled(n, gamma, beta), W, b, D, G).to(W.dtype)


def tt_norm_linear_bwd(
    gy: Tensor,  # [tokens, d_out]
    x: Tensor,  # [tokens, d_in]
    gamma: Tensor | None,  # [d_in]
    beta: Tensor | None,  # [d_in]
    W: Tensor | None,  # [d_out, d_in]; for dx
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    eps: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # dx, dD, dG in the dtypes of x, D, G
    """The gradients, themselves differentiable; no dx without W."""
    standardized, deviation = _standardized(x.to(_wide(x, gamma, beta, D, G)), eps)
    n = _scaled(standardized, gamma, beta)
    g, dD, dG = tt_linear_bwd(gy.to(n.dtype), n, W, n @ D.to(n.dtype), D, G)
    if g is None:
        return None, dD, dG
    if gamma is not None:
        g = g * gamma
    along = (g * standardized).mean(-1, keepdim=True)
    dx = (g - g.mean(-1, keepdim=True) - standardized * along) / deviation
    return dx.to(x.dtype), dD, dG


def _standardized(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x with mean 0 and deviation 1 along its last dimension, and the deviation that it had."""
    centered = x - x.mean(-1, keepdim=True)
    deviation = (centered.square().mean(-1, keepdim=True) + eps).sqrt()
    return centered / deviation, deviation


def _scaled(n: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    n = n if gamma is None else n * gamma
    return n if beta is None else n + beta


def _wide(*tensors: Tensor | None) -> torch.dtype:
    return wide(*(t for t in tensors if t is not None))
