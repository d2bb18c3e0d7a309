"""Run tt_linear on the output of a layer norm.

In the forward pass, one launch computes the norm, its statistics and h, and a second launch computes y. In the backward
pass, one launch computes dh, and a second one computes gy W + dh Dᵀ, the gradient of the norm's output. Two more
compute the sums over tokens (dG, dD and db), for which they compute the norm's output from x again. The backward pass
of the norm itself, including the gradients of its parameters, uses torch's kernels, because it sums over entire rows
of x, and a tile of a product does not contain an entire row.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from efft_kernels._arguments import transposed
from efft_kernels.eager import layer_norm_bwd
from efft_kernels.triton.lowrank_gemm import lowrank_gemm, norm_project
from efft_kernels.triton.tt_linear import Pending, multiply_backward, sums_over_tokens


def tt_norm_linear_fwd(
    x: Tensor,  # [tokens, d_in]
    gamma: Tensor | None,  # [d_in]
    beta: Tensor | None,  # [d_in]
    eps: float,
    W: Tensor,  # [d_out, d_in]
    b: Tensor | None,  # [d_out]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # y [tokens, d_out], h [tokens, r1], mean and rstd [tokens]
    n, h, mean, rstd = norm_project(x, gamma, beta, eps, D, W.dtype)
    return *lowrank_gemm(n, transposed(W), b, D, G, h), mean, rstd


def tt_norm_linear_bwd(gy: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, pending, dgamma, dbeta = tt_norm_linear_multiply_backward(gy, *rest)
    return dx, *sums_over_tokens(pending)[0], dgamma, dbeta


def tt_norm_linear_multiply_backward(
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
    need_db: bool,
    need_dgamma: bool,
    need_dbeta: bool,
) -> tuple[Tensor, Pending, Tensor, Tensor]:
    """Compute dx, dgamma and dbeta, and leave dD, dG and db to :func:`sums_over_tokens`."""
    needs = need_dx, need_dgamma, need_dbeta
    norm = {"gamma": gamma, "beta": beta, "mean": mean, "rstd": rstd}
    dn, pending = multiply_backward(gy, x, W, h, D, G, any(needs), need_dD, need_dG, need_db, producer="norm", **norm)
    dx, dgamma, dbeta = layer_norm_bwd(dn, x, gamma, beta, mean, rstd, *needs)
    return dx, pending, dgamma, dbeta
