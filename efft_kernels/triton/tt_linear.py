"""tt_linear: one launch forward (two where H is split off), two backward: dx with dh, then dG with dD."""

from __future__ import annotations

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
    dx, dD, dG, dh = gy.new_empty(0), D.new_empty(0), G.new_empty(0), None
    if need_dx:
        assert W is not None
        dx, dh = lowrank_gemm(gy, W, None, G.t(), D.t())
    elif need_dD:
        dh = project(gy, G.t())
    if need_dD or need_dG:
        sums = reduce_tokens(gy, h if need_dG else None, x, dh if need_dD else None)
        dG, dD = (
            like.new_empty(0) if total is None else total.to(like.dtype)
            for total, like in zip(sums, (G, D), strict=True)
        )
    return dx, dD, dG
