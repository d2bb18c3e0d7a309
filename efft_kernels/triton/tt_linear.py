"""Run tt_linear, y = x Wᵀ + b + h G with h = x D.

In the forward pass, one launch computes h and a second one computes y. In the backward pass, one launch computes dh, a
second one computes dx, and two more compute the sums over tokens (dG, dD and db).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from efft_kernels._arguments import rows_of, transposed, unflatten_tokens
from efft_kernels.triton.lowrank_gemm import lowrank_gemm, project
from efft_kernels.triton.reduce_tokens import reduce_tokens


def tt_linear_fwd(
    x: Tensor,  # [..., d_in]
    W: Tensor,  # [d_out, d_in]
    b: Tensor | None,  # [d_out]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
) -> tuple[Tensor, Tensor]:  # y [..., d_out], h [tokens, r1]
    y, h = lowrank_gemm(rows_of(x), transposed(W), b, D, G)
    return unflatten_tokens(y, x.shape[:-1]), h


def tt_linear_bwd(
    gy: Tensor,  # [..., d_out]
    x: Tensor | None,  # [..., d_in]
    W: Tensor | None,  # [d_out, d_in]
    h: Tensor | None,  # [tokens, r1]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    need_dx: bool,
    need_dD: bool,
    need_dG: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    leading, gy, x = gy.shape[:-1], rows_of(gy), None if x is None else rows_of(x)
    dx, dh = None, None
    if need_dx:
        assert W is not None
        dx, dh = lowrank_gemm(gy, W, None, transposed(G), transposed(D))
        dx = unflatten_tokens(dx, leading)
    elif need_dD:
        dh = project(gy, transposed(G))
    dx = gy.new_empty(0) if dx is None else dx
    return dx, *sums_over_tokens(gy, x, h if need_dG else None, dh if need_dD else None, D, G, need_db)


def sums_over_tokens(
    gy: Tensor,  # [tokens, d_out]
    x: Tensor | None,  # [tokens, d_in]
    h: Tensor | None,  # [tokens, r1]
    dh: Tensor | None,  # [tokens, r1]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    need_db: bool,
    **producer: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dD, dG, db). dD and dG are in the dtypes of the factors, but at least in fp32, and db is in fp32.

    Without ``dh``, dD is empty. Without ``h``, dG is empty. Without ``need_db``, db is empty.
    """
    dG = dD = db = None
    if h is not None or dh is not None:
        dG, dD, db = reduce_tokens(gy, h, x, dh, need_db=need_db and h is not None, **producer)
    if need_db and db is None:  # reduce_tokens sums gy only together with dG
        db = gy.sum(0, dtype=torch.float32)
    db = gy.new_empty(0, dtype=torch.float32) if db is None else db
    wide = ((total, torch.promote_types(like.dtype, torch.float32)) for total, like in ((dG, G), (dD, D)))
    dG, dD = (gy.new_empty(0, dtype=dtype) if total is None else total.to(dtype) for total, dtype in wide)
    return dD, dG, db
