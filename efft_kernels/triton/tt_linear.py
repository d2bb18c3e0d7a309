"""Run tt_linear, y = x Wᵀ + b + h G with h = x D.

In the forward pass, one launch computes h and a second one computes y. In the backward pass, one launch computes dh, a
second one computes dx, and two more compute the sums over tokens (dG, dD and db).
"""

from __future__ import annotations

import torch
from torch import Tensor

from efft_kernels._arguments import rows_of, transposed, unflatten_tokens
from efft_kernels.triton.lowrank_gemm import lowrank_gemm, project
from efft_kernels.triton.reduce_tokens import Layer, reduce_tokens


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
    leading = gy.shape[:-1]
    dx, layer = multiply_backward(
        *(rows_of(gy), None if x is None else rows_of(x), W, h, D, G, need_dx, need_dD, need_dG, need_db)
    )
    return unflatten_tokens(dx, leading) if need_dx else dx, *sums_over_tokens((layer, D, G))[0]


def multiply_backward(
    gy: Tensor,  # [tokens, d_out]
    x: Tensor | None,  # [tokens, d_in]
    W: Tensor | None,  # [d_out, d_in]
    h: Tensor | None,  # [tokens, r1]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    need_dx: bool,
    need_dD: bool,
    need_dG: bool,
    need_db: bool,
) -> tuple[Tensor, Layer]:
    """Return dx, with 0 elements if it is not needed, and the operands of the sums over tokens."""
    dx, dh = None, None
    if need_dx:
        assert W is not None
        dx, dh = lowrank_gemm(gy, W, None, transposed(G), transposed(D))
    elif need_dD:
        dh = project(gy, transposed(G))
    return gy.new_empty(0) if dx is None else dx, Layer(gy, h if need_dG else None, x, dh if need_dD else None, need_db)


def sums_over_tokens(*layers: tuple[Layer, Tensor, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return dD, dG and db of one or two layers. A layer is given by the operands of its sums and its factors D and G.

    dD and dG are in the dtypes of the factors, but at least in fp32, and db is in fp32. A gradient that is not needed
    has the shape [0].
    """
    found = []
    for (_, D, G), (dG, dD, db) in zip(layers, reduce_tokens(*[layer for layer, _, _ in layers]), strict=True):
        found.append((_in_wide_dtype(dD, D), _in_wide_dtype(dG, G), db))
    return found


def _in_wide_dtype(total: Tensor, factor: Tensor) -> Tensor:
    """Return an fp32 sum in the dtype of the factor, but at least in fp32."""
    return total.double() if factor.dtype == torch.float64 else total
