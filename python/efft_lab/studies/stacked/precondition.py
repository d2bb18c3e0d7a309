"""Precondition the gradients of a train's factors by the metric of its updates."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

#: The damping of :func:`preconditioned`.
DAMPING = 0.01
#: The steps of Newton's iteration, which suffice for a condition number of 10 / DAMPING.
_ITERATIONS = 16


def inverse(matrix: Tensor) -> Tensor:
    """Return the inverse of positive matrices [..., r, r], scaled and damped (see :func:`preconditioned`).

    It is computed by Newton's iteration.
    """
    r = matrix.shape[-1]
    eye = torch.eye(r, device=matrix.device)
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    matrix = torch.where(mean > 0, matrix / mean.clamp(min=1e-30) + DAMPING * eye, eye)
    guess = eye / matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    for _ in range(_ITERATIONS):
        guess = 2 * guess - guess @ matrix @ guess
    return guess


@torch.no_grad()
def preconditioned(factors: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return dU (sum of C V Vᵀ Cᵀ)⁻¹, (Uᵀ U)⁻¹ dC (V Vᵀ)⁻¹ and (sum of Cᵀ Uᵀ U C)⁻¹ dV.

    Each matrix is divided by the mean of its diagonal, and `DAMPING` is added to it. If a factor is zero, the matrix is
    the identity.

    Args:
        factors: U [K, d_in, r1], C [K, layers, cores, r1, r2] and V [K, r2, d_out] of one bank in each of K runs.
        gradients: the gradients of these factors.
    """
    U, C, V = (factors[name] for name in "UCV")
    of_U, of_V = U.mT @ U, V @ V.mT  # [K, r, r]
    left = (C @ of_V[:, None, None] @ C.mT).sum((1, 2))
    right = (C.mT @ of_U[:, None, None] @ C).sum((1, 2))
    inner = inverse(of_U)[:, None, None], inverse(of_V)[:, None, None]
    return {
        "U": gradients["U"] @ inverse(left),
        "C": inner[0] @ gradients["C"] @ inner[1],
        "V": inverse(right) @ gradients["V"],
    }
