"""Compute the gradients of the factors D, G and the bias b of a layer: dD = xᵀ dh, dG = hᵀ gy and db = Σ gy.

The layer computes y = x Wᵀ + b + h G with h = x D. gy is the gradient of y, and dh = gy Gᵀ is that of h. R is the
number of columns of h.

All three gradients are fp32 sums over the tokens, computed in the same two launches. The tokens are divided into
ranges. A program of the first kernel computes one block of dG (or of dD) for one range of tokens: it multiplies a block
of columns of gy (or of x) by a block of at most 64 columns of h (or of dh), and keeps the sum in registers, without
atomic additions. If db is needed, the programs that compute dG also sum gy. The number of ranges is chosen to fill the
GPU. A second, small kernel adds the partial sums of all ranges in a fixed order. Equal calls therefore return exactly
equal results.

If x is the output of a GELU or a layer norm, the *producer*, the kernel can read the input of the producer instead and
compute x from it (:mod:`efft_kernels.triton.producers`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from efft_kernels.triton.launch import ceil_div, device, on_device, precision, rank_block
from efft_kernels.triton.producers import produced

# BLOCK_M is the number of tokens per step, and STAGES is the number of steps whose loads are in flight. These loads
# suffice to use the full memory bandwidth, which limits the speed. Two programs fit on a multiprocessor at the same
# time, with any producer. If there were more programs, the rest would run afterwards and leave a part of the GPU idle.
BLOCK_M, STAGES = 64, 3
PROGRAMS_A_PROCESSOR = 2
# Number of elements of dG, dD and db that one program of the second kernel computes, and its number of warps.
FINISH_BLOCK, FINISH_WARPS = 512, 4


def columns_and_warps(producer: str) -> tuple[int, int]:
    """Return BLOCK_N, the number of columns of gy or x per program, and the number of warps of the first kernel.

    The blocks are smaller with a producer, because the kernel then needs more registers (according to
    ``python -m tests.efft_kernels.triton.resource_report``).
    """
    return (128, 4) if producer == "none" else (64, 8)


@triton.jit
def _sum_over_tokens(
    wide,  # [M, N], read through the producer
    gamma,
    beta,
    mean,
    rstd,
    thin,  # [M, R], contiguous
    out,  # [N, R] of any strides, fp32
    sums,  # [N], fp32, receives the sum of wide; None if that sum is not needed
    M,
    N,
    R,
    stride_wm,
    stride_wn,
    stride_on,
    stride_or,
    begin,  # this program sums the tokens from begin to begin + TOKENS - 1
    column,
    rank,
    TOKENS,
    PRODUCER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    m = begin + tl.arange(0, BLOCK_M)
    n = column.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = rank.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_n, in_r = n < N, r < R
    total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    of_rows = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, TOKENS, BLOCK_M):
        in_m = (m + start < M) & (start + tl.arange(0, BLOCK_M) < TOKENS)
        w = tl.load(
            wide + (m + start)[:, None] * stride_wm + n[None, :] * stride_wn,
            mask=in_m[:, None] & in_n[None, :],
            other=0.0,
        )
        if sums is not None:
            of_rows += tl.sum(w.to(tl.float32), 0)
        if PRODUCER != "none":
            mu, sigma = 0.0, 0.0
            if PRODUCER == "norm":
                mu = tl.load(mean + m + start, mask=in_m, other=0.0)
                sigma = tl.load(rstd + m + start, mask=in_m, other=0.0)
            w = produced(w, gamma, beta, mu, sigma, n, in_n, PRODUCER, thin.dtype.element_ty)
        t = tl.load(thin + (m + start)[:, None] * R + r[None, :], mask=in_m[:, None] & in_r[None, :], other=0.0)
        total = tl.dot(tl.trans(w), t, total, input_precision=PRECISION)
    tl.store(out + n[:, None] * stride_on + r[None, :] * stride_or, total, mask=in_n[:, None] & in_r[None, :])
    if sums is not None:  # noqa: SIM102  # this condition is evaluated at compile time, the inner one at run time
        if rank == 0:
            tl.store(sums + n, of_rows, mask=in_n)


@triton.jit
def reduce_tokens_kernel(
    gy,  # [M, d_out]
    h,  # [M, R], contiguous
    x,  # [M, d_in], read through the producer
    gamma,  # [d_in] or None
    beta,  # [d_in] or None
    mean,  # [M] or None
    rstd,  # [M] or None
    dh,  # [M, R], contiguous
    partial,  # [splits, n], fp32, contiguous: per split dG [R, d_out], dD [d_in, R] and, if needed, db [d_out]
    M,
    d_out,
    d_in,
    R,
    stride_gm,
    stride_gn,
    stride_xm,
    stride_xn,
    TOKENS,  # tokens per split, a multiple of BLOCK_M
    columns_out,  # number of column blocks of gy; 0 if dG is not needed
    NEED_DB: tl.constexpr,
    PRODUCER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    column, split, rank = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    begin = split * TOKENS
    n = R * (d_out + d_in)
    if NEED_DB:
        n += d_out
    dG = partial + split * n
    dD = dG + R * d_out
    db = dD + d_in * R if NEED_DB else None
    if column < columns_out:
        _sum_over_tokens(
            *(gy, None, None, None, None, h, dG, db, M, d_out, R, stride_gm, stride_gn, 1, d_out),
            *(begin, column, rank, TOKENS, "none", PRECISION, BLOCK_M, BLOCK_N, BLOCK_R),
        )
    else:
        _sum_over_tokens(
            *(x, gamma, beta, mean, rstd, dh, dD, None, M, d_in, R, stride_xm, stride_xn, R, 1),
            *(begin, column - columns_out, rank, TOKENS, PRODUCER, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R),
        )


@triton.jit
def finish_kernel(partial, dG, dD, db, n_G, n_D, n_b, splits, BLOCK: tl.constexpr):
    """Sum ``partial`` [splits, n_G + n_D + n_b] over the splits into dG, dD and db of n_G, n_D and n_b elements."""
    n = n_G + n_D + n_b
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        total += tl.load(partial + i, mask=i < n, other=0.0)
        partial += n
    tl.store(dG + i, total, mask=i < n_G)
    tl.store(dD + (i - n_G), total, mask=(i >= n_G) & (i < n_G + n_D))
    tl.store(db + (i - n_G - n_D), total, mask=(i >= n_G + n_D) & (i < n))


def reduce_tokens(
    gy: Tensor | None,  # [M, d_out]
    h: Tensor | None,  # [M, R]
    x: Tensor | None,  # [M, d_in]
    dh: Tensor | None,  # [M, R]
    splits: int | None = None,
    *,
    need_db: bool = False,
    producer: str = "none",
    gamma: Tensor | None = None,  # [d_in]
    beta: Tensor | None = None,  # [d_in]
    mean: Tensor | None = None,  # [M]
    rstd: Tensor | None = None,  # [M]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (dG [R, d_out], dD [d_in, R], db [d_out]) in fp32.

    The caller must pass at least one of the pairs (gy, h) and (x, dh). dG is None if h is None, and dD is None if dh is
    None. db is None without ``need_db``; with ``need_db`` the caller must pass gy and h.

    With a ``producer`` (see :mod:`efft_kernels.triton.producers`), ``x`` is the input of the producer.
    ``splits``, the number of ranges of tokens, overrides the automatic choice.
    """
    # project and lowrank_gemm return contiguous tensors, which are not copied here.
    h, dh = (None if t is None else t.contiguous() for t in (h, dh))
    gamma, beta = (None if t is None else t.contiguous() for t in (gamma, beta))
    given = h if h is not None else dh
    assert given is not None
    M, R = given.shape
    d_out = 0 if h is None or gy is None else gy.shape[1]
    d_in = 0 if dh is None or x is None else x.shape[1]
    block_n, warps = columns_and_warps(producer)
    columns_out, columns_in = ceil_div(d_out, block_n), ceil_div(d_in, block_n)
    ranks = ceil_div(R, rank_block(R))
    if splits is None:
        splits = PROGRAMS_A_PROCESSOR * device(given.device).processors // max((columns_out + columns_in) * ranks, 1)
        splits = max(1, min(splits, ceil_div(M, 4 * BLOCK_M)))
    tokens = ceil_div(ceil_div(M, splits), BLOCK_M) * BLOCK_M
    n_b = d_out if need_db else 0
    in_fp32: Any = {"dtype": torch.float32, "device": given.device}
    partial = torch.empty(splits, R * (d_out + d_in) + n_b, **in_fp32)
    dG, dD, db = (torch.empty(sizes, **in_fp32) for sizes in ((R, d_out), (d_in, R), (n_b,)))
    if partial.numel():
        gy_, h_, x_, dh_ = (given if t is None else t for t in (gy, h, x, dh))  # no kernel reads these substitutes
        with on_device(given):
            reduce_tokens_kernel[(columns_out + columns_in, splits, ranks)](
                *(gy_, h_, x_, gamma, beta, mean, rstd, dh_, partial, M, d_out, d_in, R),
                *(*gy_.stride(), *x_.stride(), tokens, columns_out),
                NEED_DB=need_db,
                PRODUCER=producer,
                PRECISION=precision(given),
                BLOCK_M=BLOCK_M,
                BLOCK_N=block_n,
                BLOCK_R=rank_block(R),
                num_warps=warps,
                num_stages=STAGES,
            )
            finish_kernel[(ceil_div(partial.shape[1], FINISH_BLOCK),)](
                *(partial, dG, dD, db, dG.numel(), dD.numel(), n_b, splits),
                BLOCK=FINISH_BLOCK,
                num_warps=FINISH_WARPS,
            )
    return (dG if h is not None else None), (dD if dh is not None else None), (db if need_db else None)
