"""Precondition the gradients of the factors of a tensor train.

The tensor train updates matrix i by ``U C_i V``. The gradient of each factor is multiplied by inverses of matrices that
depend on the other factors. The size of these other factors then has less influence on how far a step moves the
updates.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

#: Multiple of the identity that :func:`inverse` adds to a matrix.
DAMPING = 0.01
#: Number of steps of Newton's iteration, which suffice for a condition number of 10 / DAMPING.
_ITERATIONS = 16


def inverse(matrix: Tensor) -> Tensor:
    """Return damped inverses of positive semidefinite matrices [..., r, r], computed by Newton's iteration.

    Before a matrix is inverted, it is divided by the mean of its diagonal, and `DAMPING` times the identity is added. A
    matrix of zeros is replaced by the identity.
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
    """Return the preconditioned gradients of one tensor train in each of K runs.

    For the gradients dU, dC and dV, the results are ``dU (Σ C V Vᵀ Cᵀ)⁻¹``, ``(Uᵀ U)⁻¹ dC (V Vᵀ)⁻¹`` and
    ``(Σ Cᵀ Uᵀ U C)⁻¹ dV``. The sums are over all cores, and the inverses are those of :func:`inverse`.

    Args:
        factors: U [K, d_in, r1], C [K, layers, cores, r1, r2] and V [K, r2, d_out].
        gradients: the gradients of these factors, with the same shapes.
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
