"""Run tt_linear on the output of a GELU: one launch computes gelu(z) and h, and a second one computes y.

In the backward pass, one launch computes dh, a second one computes dz, and two more compute the sums over tokens (dG,
dD and db). The second launch also multiplies its product by the slope of the GELU, and the sums over tokens compute
gelu(z) from z. No tensor of the size of z is saved except z itself, and the backward pass writes no such tensor except
dz.
"""

from __future__ import annotations

from torch import Tensor

from efft_kernels._arguments import transposed
from efft_kernels.triton.lowrank_gemm import gelu_project, lowrank_gemm, project
from efft_kernels.triton.reduce_tokens import Layer
from efft_kernels.triton.tt_linear import sums_over_tokens

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


def tt_gelu_linear_bwd(
    gy: Tensor,  # [tokens, d_out]
    z: Tensor,  # [tokens, d_in]
    W: Tensor | None,  # [d_out, d_in]
    h: Tensor | None,  # [tokens, r1]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    approximate: str,
    need_dz: bool,
    need_dD: bool,
    need_dG: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dz, layer = multiply_backward(gy, z, W, h, D, G, approximate, need_dz, need_dD, need_dG, need_db)
    return dz, *sums_over_tokens((layer, D, G))[0]


def multiply_backward(
    gy: Tensor,  # [tokens, d_out]
    z: Tensor,  # [tokens, d_in]
    W: Tensor | None,  # [d_out, d_in]
    h: Tensor | None,  # [tokens, r1]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    approximate: str,
    need_dz: bool,
    need_dD: bool,
    need_dG: bool,
    need_db: bool,
) -> tuple[Tensor, Layer]:
    """Return dz, with 0 elements if it is not needed, and the operands of the sums over tokens."""
    producer = _PRODUCER[approximate]
    dz, dh = None, None
    if need_dz:
        assert W is not None
        dz, dh = lowrank_gemm(gy, W, None, transposed(G), transposed(D), Z=z, producer=producer)
    elif need_dD:
        dh = project(gy, transposed(G))
    return z.new_empty(0) if dz is None else dz, Layer(
        gy, h if need_dG else None, z, dh if need_dD else None, need_db, producer
    )
