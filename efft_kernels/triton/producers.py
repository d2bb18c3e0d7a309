"""Compute a GELU or a layer norm, the slope of a GELU, and the statistics of a layer norm, for tiles and in fp32.

The producer of an adapted layer is the GELU or the layer norm whose output the layer reads. A kernel that reads an
activation through ``produced`` reads the input of the producer and computes its output, so that the output need not be
stored. ``PRODUCER`` is one of "none", "gelu", "gelu_tanh" (torch's ``approximate="tanh"``) and "norm".

``dtype`` is the dtype of the product. In half precision, the exact GELU would take longer than the kernel's memory
traffic. The upper tail of the normal distribution is therefore approximated by one exponential of a polynomial
(:func:`_upper_tail`).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def produced(
    values,  # [rows, columns], the input of the producer
    gamma,  # [d] or None
    beta,  # [d] or None
    mean,  # [rows], for "norm"
    rstd,  # [rows], for "norm"
    columns,  # [columns], their indices in gamma and beta
    in_columns,  # [columns], whether the column exists
    PRODUCER: tl.constexpr,
    dtype: tl.constexpr,
):
    """Return the output of the producer in ``dtype``."""
    values = values.to(tl.float32)
    if PRODUCER == "gelu" or PRODUCER == "gelu_tanh":
        if dtype != tl.float32:
            size, tail = _upper_tail(values, PRODUCER)
            values = tl.maximum(values, 0.0) - size * tail
        elif PRODUCER == "gelu":
            values = 0.5 * values * (1.0 + tl.erf(values * 0.7071067811865476))
        else:
            values *= tl.sigmoid(_tanh_argument(values))
    if PRODUCER == "norm":
        values = (values - mean[:, None]) * rstd[:, None]
        if gamma is not None:
            values *= tl.load(gamma + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        if beta is not None:
            values += tl.load(beta + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    return values.to(dtype)


@triton.jit
def gelu_slope(z, PRODUCER: tl.constexpr, dtype: tl.constexpr):
    """Return d gelu(z) / dz in fp32, with the accuracy that a product in ``dtype`` needs."""
    z = z.to(tl.float32)
    if dtype != tl.float32:
        size, tail = _upper_tail(z, PRODUCER)
        if PRODUCER == "gelu":
            density = tl.exp2(-0.7213475204444817 * size * size - 1.3257480647361593)
        else:
            density = tail * (1.0 - tail) * (0.21406444881780073 * size * size + 1.5957691216057308)
        negative = tail - size * density  # the slope at -size
        return tl.where(z > 0.0, 1.0 - negative, negative)
    if PRODUCER == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        return cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    s = tl.sigmoid(_tanh_argument(z))
    return s + z * s * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * z * z))


@triton.jit
def _upper_tail(z, PRODUCER: tl.constexpr):
    """Return (|z|, P(Z > |z|)) for half precision.

    Z is standard normal, or has the approximate distribution that "gelu_tanh" uses. The tail of the normal distribution
    is computed as the exponential of a polynomial, with a relative error of 6e-6, a hundredth of the rounding error of
    float16. |z| is clamped to 6, where gelu(-z) is -6e-9, less than half of the smallest float16. NaN stays NaN.
    """
    size = tl.minimum(tl.abs(z), 6.0, propagate_nan=tl.PropagateNan.ALL)
    if PRODUCER == "gelu_tanh":
        return size, tl.sigmoid(-_tanh_argument(size))
    log2 = -1.834809040701657e-06 * size + 6.159824260976166e-05  # coefficients minimize the largest error over [0, 6]
    log2 = log2 * size - 0.000930524431169033
    log2 = log2 * size + 0.008507889695465565
    log2 = log2 * size - 0.05396006628870964
    log2 = log2 * size - 0.4584643840789795
    log2 = log2 * size - 1.1512510776519775
    log2 = log2 * size - 0.9999952912330627
    return size, tl.exp2(log2)


@triton.jit
def _tanh_argument(z):
    # (1 + tanh(u)) / 2 = sigmoid(2 u) with u = sqrt(2 / pi) (z + 0.044715 z³)
    return 1.5957691216057308 * (z + 0.044715 * z * z * z)


@triton.jit
def row_statistics(
    rows_at,  # [BLOCK_M, BLOCK_K], pointers to the first columns of the rows
    in_m,  # [BLOCK_M, 1]
    k,  # [BLOCK_K]
    K,
    stride_k,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return (mean, 1 / sqrt(var + eps)) of rows [BLOCK_M, K].

    The rows are read twice, the second time from the cache. Computing the variance in one pass, as the mean square
    minus the squared mean, would lose digits by cancellation.
    """
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=3):  # num_stages, because Triton only pipelines products by default
        a = tl.load(rows_at + start * stride_k, mask=in_m & (k < K - start)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(a, 1)
    mean = total / K
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=3):
        in_k = (k < K - start)[None, :]
        a = tl.load(rows_at + start * stride_k, mask=in_m & in_k, other=0.0).to(tl.float32)
        a = tl.where(in_k, a - mean[:, None], 0.0)
        total += tl.sum(a * a, 1)
    return mean, 1.0 / tl.sqrt(total / K + eps)
