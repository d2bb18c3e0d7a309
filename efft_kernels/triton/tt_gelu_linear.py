"""Run tt_linear on the output of a GELU: one launch computes gelu(z) and h, and a second one computes y.

In the backward pass, one launch computes dh, a second one computes dz, and two more compute the sums over tokens (dG,
dD and db). The second launch also multiplies its product by the slope of the GELU, and the sums over tokens compute
gelu(z) from z. No tensor of the size of z is saved except z itself, and the backward pass writes no such tensor except
dz.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from efft_kernels._arguments import transposed
from efft_kernels.triton.lowrank_gemm import gelu_project, lowrank_gemm
from efft_kernels.triton.tt_linear import Pending, multiply_backward, sums_over_tokens

_PRODUCER = {"none": "gelu", "tanh": "gelu_tanh"}


def tt_gelu_linear_fwd(
    z: Tensor,  # [tokens, d_in]
    W: Tensor,  # [d_out, d_in]
    b: Tensor | None,  # [d_out]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    approximate: str,
) -> tuple[Tensor, Tensor]:  # y [tokens, d_out], h [tokens, r1]
    a, h = gelu_project(z, D, _PRODUCER[approximate], W.dtype)
    return lowrank_gemm(a, transposed(W), b, D, G, h)


def tt_gelu_linear_bwd(gy: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dz, pending = tt_gelu_linear_multiply_backward(gy, *rest)
    return dz, *sums_over_tokens(pending)[0]


def tt_gelu_linear_multiply_backward(
    gy: Tensor,  # [tokens, d_out]
    z: Tensor,  # [tokens, d_in]
    W: Tensor | None,  # [d_out, d_in]
    h: Tensor | None,  # [tokens, r1]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    approximate: str,
    *needs: bool,  # of dz, dD, dG and db
) -> tuple[Tensor, Pending]:
    """Compute dz, and leave dD, dG and db to :func:`sums_over_tokens`."""
    return multiply_backward(gy, z, W, h, D, G, *needs, producer=_PRODUCER[approximate])
