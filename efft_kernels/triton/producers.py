"""What stands in front of an adapted layer, on tiles in fp32: GELU and its slope, layer norm.

A kernel that reads an activation through ``produced`` reads what the producer got instead of what it put out, so that
its output need not be kept. ``PRODUCER`` is one of "none", "gelu", "gelu_tanh" (torch's ``approximate``), "norm".
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def produced(
    values,  # [rows, columns]: what the producer got
    gamma,  # [d] or None
    beta,  # [d] or None
    mean,  # [rows], of "norm"
    rstd,  # [rows], of "norm"
    columns,
    in_columns,
    PRODUCER: tl.constexpr,
):
    """What the producer puts out, in fp32."""
    values = values.to(tl.float32)
    if PRODUCER == "gelu":
        values = 0.5 * values * (1.0 + tl.erf(values * 0.7071067811865476))
    if PRODUCER == "gelu_tanh":
        values *= tl.sigmoid(_tanh_argument(values))
    if PRODUCER == "norm":
        values = (values - mean[:, None]) * rstd[:, None]
        if gamma is not None:
            values *= tl.load(gamma + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        if beta is not None:
            values += tl.load(beta + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    return values


@triton.jit
def gelu_slope(z, PRODUCER: tl.constexpr):
    """d gelu(z) / dz of a tile in fp32."""
    if PRODUCER == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        return cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    s = tl.sigmoid(_tanh_argument(z))
    return s + z * s * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * z * z))


@triton.jit
def _tanh_argument(z):
    # (1 + tanh(u)) / 2 = sigmoid(2 u) with u = sqrt(2 / pi) (z + 0.044715 z³)
    return 1.5957691216057308 * (z + 0.044715 * z * z * z)


@triton.jit
def row_statistics(
    rows_at,  # [BLOCK_M, BLOCK_K]: pointers to the first columns of the rows
    in_m,  # [BLOCK_M, 1]
    k,  # [BLOCK_K]
    K,
    stride_k,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(mean, 1 / sqrt(var + eps)) of rows [BLOCK_M, K]; two reads, the second from the cache, because a variance from
    the mean square would cancel."""
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(rows_at + start * stride_k, mask=in_m & (k < K - start)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(a, 1)
    mean = total / K
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, K, BLOCK_K):
        in_k = (k < K - start)[None, :]
        a = tl.load(rows_at + start * stride_k, mask=in_m & in_k, other=0.0).to(tl.float32)
        a = tl.where(in_k, a - mean[:, None], 0.0)
        total += tl.sum(a * a, 1)
    return mean, 1.0 / tl.sqrt(total / K + eps)
