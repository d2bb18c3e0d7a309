"""tt_linear: two launches forward, h and y; in backward dh, dx, and one reduction for both dG and dD."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from efft_kernels.triton.lowrank_gemm import lowrank_gemm, project
from efft_kernels.triton.reduce_tokens import reduce_tokens


def tt_linear_fwd(
    x: Tensor,  # [tokens, d_in]
    W: Tensor,  # [d_out, d_in]
    b: Tensor | None,  # [d_out]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
) -> tuple[Tensor, Tensor]:  # y [tokens, d_out], h [tokens, r1]
    return lowrank_gemm(x, W.t(), b, D, G)


def tt_linear_bwd(
    gy: Tensor,  # [tokens, d_out]
    x: Tensor | None,  # [tokens, d_in]
    W: Tensor | None,  # [d_out, d_in]
    h: Tensor | None,  # [tokens, r1]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    need_dx: bool,
    need_dD: bool,
    need_dG: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dh = gy.new_empty(0), None
    if need_dx:
        assert W is not None
        dx, dh = lowrank_gemm(gy, W, None, G.t(), D.t())
    elif need_dD:
        dh = project(gy, G.t())
    return dx, *factor_gradients(gy, x, h if need_dG else None, dh if need_dD else None, D, G)


def factor_gradients(
    gy: Tensor,  # [tokens, d_out]
    x: Tensor | None,  # [tokens, d_in]
    h: Tensor | None,  # [tokens, r1]
    dh: Tensor | None,  # [tokens, r1]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    **producer: Any,
) -> tuple[Tensor, Tensor]:
    """(dD, dG) in the dtypes of the factors; without ``dh``, dD has no elements, and without ``h``, dG has none."""
    sums = (None, None) if h is dh is None else reduce_tokens(gy, h, x, dh, **producer)
    dG, dD = (
        like.new_empty(0) if total is None else total.to(like.dtype) for total, like in zip(sums, (G, D), strict=True)
    )
    return dD, dG
