"""Run tt_linear, y = x Wᵀ + b + h G with h = x D.

In the forward pass, one launch computes h and a second one computes y. In the backward pass, one launch computes dh, a
second one computes dx, and two more compute the sums over tokens (dG, dD and db).
"""

from __future__ import annotations

from typing import NamedTuple

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
    x = None if x is None else rows_of(x)
    dx, pending = multiply_backward(rows_of(gy), x, W, h, D, G, need_dx, need_dD, need_dG, need_db)
    return unflatten_tokens(dx, gy.shape[:-1]) if need_dx else dx, *sums_over_tokens(pending)[0]


class Pending(NamedTuple):
    """Hold the sums over tokens of a layer that are still to be computed, and the layer's factors."""

    operands: Layer
    D: Tensor  # [d_in, r1]
    G: Tensor  # [r1, d_out]


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
    *,
    producer: str = "none",
    **norm: Tensor | None,
) -> tuple[Tensor, Pending]:
    """Run the products of a layer's backward pass.

    With a ``producer`` (see :mod:`efft_kernels.triton.producers`), ``x`` is its input. ``norm`` contains the gamma,
    beta, mean and rstd of a layer norm.

    Returns:
        dx, and the sums that remain. For a norm, dx is the gradient of its output, and otherwise that of ``x``. If dx
        is not needed, it has 0 elements.
    """
    Z, slope = (None, "none") if producer in ("none", "norm") else (x, producer)  # of a GELU
    dx, dh = None, None
    if need_dx:
        assert W is not None
        dx, dh = lowrank_gemm(gy, W, None, transposed(G), transposed(D), Z=Z, producer=slope)
    elif need_dD:
        dh = project(gy, transposed(G))
    if dx is None:
        dx = (gy if Z is None else Z).new_empty(0)
    operands = Layer(gy, h if need_dG else None, x, dh if need_dD else None, need_db, producer, **norm)
    return dx, Pending(operands, D, G)


def sums_over_tokens(*pending: Pending) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return dD, dG and db of one or two layers.

    dD and dG are in the dtypes of the factors, but at least in fp32, and db is in fp32. A gradient that is not needed
    has the shape [0].
    """
    sums = reduce_tokens(*[layer.operands for layer in pending])
    return [
        (_in_wide_dtype(dD, layer.D), _in_wide_dtype(dG, layer.G), db)
        for layer, (dG, dD, db) in zip(pending, sums, strict=True)
    ]


def _in_wide_dtype(total: Tensor, factor: Tensor) -> Tensor:
    """Return an fp32 sum in the dtype of the factor, but at least in fp32."""
    return total.double() if factor.dtype == torch.float64 else total
