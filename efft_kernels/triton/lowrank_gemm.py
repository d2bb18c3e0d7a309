"""Y = A B + bias + H T with H = A P: a matrix product whose accumulator also takes a rank-r product.

Both directions of tt_linear are this product:

    forward    y  = x Wᵀ + b + h G,     h  = x D      A = x,  B = Wᵀ, P = D,  T = G
    backward   dx = gy W     + dh Dᵀ,   dh = gy Gᵀ    A = gy, B = W,  P = Gᵀ, T = Dᵀ

Fused: the rank-r tail is one more product into the fp32 accumulator of the output tile, so nothing of Y's size is
written twice, read again or concatenated. H comes in one of two ways:

``recompute``  every program makes its rows of H in the main loop, from the tiles of A that it has at hand anyway. No
               second kernel and no second read of A, for r / BLOCK_N more arithmetic. The first column of programs
               stores H for the backward.
``split``      H is made by a kernel of its own (:func:`project`) that reads A once; the tail loads it. Where a GELU or
               a layer norm stands in front, that kernel also is the producer: it reads z, writes A = gelu(z) and H.

Behind a GELU the backward's epilogue multiplies Y by the GELU's slope at z, so that dz is what is stored; always in the
split form, since such outputs are wide and the slope needs the registers. In the
grouped form every sample has P and T of its own: a program's rows belong to one sample, and P and T are found by its
adapter's number; a number beyond the last makes NaN.

Numbers: products in A's dtype with fp32 accumulation; P and T are cast to A's dtype as they are loaded; H is rounded to
A's dtype once, in both forms; Y is rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from efft_kernels.triton import lowrank_gemm_tma
from efft_kernels.triton.launch import TAIL_R, GemmTile, gemm_tile, on_device, precision, rank_block, recomputes
from efft_kernels.triton.producers import gelu_slope, produced, row_statistics

# Rows of A that one program of the projection takes, and columns per step: it reads A once, whatever the rank.
PROJECT_M, PROJECT_STAGES = 64, 3


@triton.jit
def lowrank_gemm_kernel(
    A,  # [M, K]
    B,  # [K, N]
    bias,  # [N] or None
    P,  # [K, R]
    T,  # [R, N]
    H,  # [M, R], contiguous: written if RECOMPUTE and not None, else read
    Z,  # [M, N] or None: what the GELU in front of the layer got, in the backward
    Y,  # [M, N], contiguous
    adapter,  # [samples] or None: which of P [n, K, R] and T [n, R, N] the rows of a sample take, A is [samples, M, K]
    n_adapters,
    samples,
    M,
    N,
    K,
    R,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_bias,
    stride_pk,
    stride_pr,
    stride_tr,
    stride_tn,
    stride_zm,
    stride_zn,
    stride_as,
    stride_ps,
    stride_ts,
    PRODUCER: tl.constexpr,  # of Z
    RECOMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,  # RECOMPUTE needs BLOCK_R >= R
    GROUP_M: tl.constexpr,
):
    # Programs go down GROUP_M row blocks before the next column block, so that both operands stay in the L2 cache.
    tile = tl.program_id(0)
    of_sample, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    rows = samples * of_sample
    group = tile // (GROUP_M * columns)
    first = group * GROUP_M
    height = tl.minimum(rows - first, GROUP_M)
    tile_m = first + (tile % (GROUP_M * columns)) % height
    tile_n = (tile % (GROUP_M * columns)) // height
    if adapter is not None:
        sample = (tile_m // of_sample).to(tl.int64)
        tile_m = tile_m % of_sample
        which = tl.load(adapter + sample)
        A, H, Y = A + sample * stride_as, H + sample * M * R, Y + sample * M * N
        missing = which >= n_adapters
        R = tl.where((which < 0) | missing, 0, R)  # none: no column of P and T is read
        P, T = P + which * stride_ps, T + which * stride_ts

    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # int64: M * K may pass 2^31
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    r = tl.arange(0, BLOCK_R).to(tl.int64)
    in_m, in_n = (m < M)[:, None], (n < N)[None, :]

    a_at = A + m[:, None] * stride_am + k[None, :] * stride_ak  # [BLOCK_M, BLOCK_K]
    b_at = B + k[:, None] * stride_bk + n[None, :] * stride_bn  # [BLOCK_K, BLOCK_N]
    p_at = P + k[:, None] * stride_pk + r[None, :] * stride_pr  # [BLOCK_K, BLOCK_R]
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    h_sum = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        in_k = k < K - start
        a = tl.load(a_at, mask=in_m & in_k[None, :], other=0.0)
        b = tl.load(b_at, mask=in_k[:, None] & in_n, other=0.0)
        y = tl.dot(a, b, y, input_precision=PRECISION)
        if RECOMPUTE:
            p = tl.load(p_at, mask=in_k[:, None] & (r < R)[None, :], other=0.0).to(a.dtype)
            h_sum = tl.dot(a, p, h_sum, input_precision=PRECISION)
            p_at += BLOCK_K * stride_pk
        a_at += BLOCK_K * stride_ak
        b_at += BLOCK_K * stride_bk

    if RECOMPUTE:
        in_r = r < R
        h = h_sum.to(H.dtype.element_ty)
        if tile_n == 0 and adapter is None:
            tl.store(H + m[:, None] * R + r[None, :], h, mask=in_m & in_r[None, :])
        t = tl.load(T + r[:, None] * stride_tr + n[None, :] * stride_tn, mask=in_r[:, None] & in_n, other=0.0)
        y = tl.dot(h, t.to(h.dtype), y, input_precision=PRECISION)
    else:
        for start in tl.range(0, R, BLOCK_R, num_stages=1):  # few steps: buffers for more in flight would be wasted
            in_r = r < R - start
            h = tl.load(H + m[:, None] * R + (start + r)[None, :], mask=in_m & in_r[None, :], other=0.0)
            t_at = T + (start + r)[:, None] * stride_tr + n[None, :] * stride_tn
            t = tl.load(t_at, mask=in_r[:, None] & in_n, other=0.0)
            y = tl.dot(h, t.to(h.dtype), y, input_precision=PRECISION)
    if bias is not None:
        y += tl.load(bias + n * stride_bias, mask=n < N, other=0.0)[None, :].to(tl.float32)
    if Z is not None:
        z = tl.load(Z + m[:, None] * stride_zm + n[None, :] * stride_zn, mask=in_m & in_n, other=0.0)
        y *= gelu_slope(z, PRODUCER, H.dtype.element_ty)
    if adapter is not None:
        y = tl.where(missing, float("nan"), y)
    tl.store(Y + m[:, None] * N + n[None, :], y.to(Y.dtype.element_ty), mask=in_m & in_n)


@triton.jit
def project_kernel(
    A,  # [M, K]
    P,  # [K, R]
    H,  # [M, R], contiguous
    out,  # [M, K], contiguous, or None: what the producer puts out
    gamma,  # [K] or None
    beta,  # [K] or None
    mean,  # [M] or None, written
    rstd,  # [M] or None, written
    eps,
    adapter,  # [samples] or None: as in the product
    n_adapters,
    M,
    K,
    R,
    stride_am,
    stride_ak,
    stride_pk,
    stride_pr,
    stride_as,
    stride_ps,
    PRODUCER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    in_m, in_r = (m < M)[:, None], (r < R)[None, :]
    in_p = in_r
    if adapter is not None:
        sample = tl.program_id(2).to(tl.int64)
        which = tl.load(adapter + sample)
        A, H = A + sample * stride_as, H + sample * M * R
        in_p = (r < tl.where((which < 0) | (which >= n_adapters), 0, R))[None, :]
        P += which * stride_ps
    a_at = A + m[:, None] * stride_am + k[None, :] * stride_ak
    p_at = P + k[:, None] * stride_pk + r[None, :] * stride_pr
    mu, sigma = 0.0, 0.0
    if PRODUCER == "norm":
        mu, sigma = row_statistics(a_at, in_m, k, K, stride_ak, eps, BLOCK_M, BLOCK_K)
        if tl.program_id(1) == 0:
            tl.store(mean + m, mu, mask=m < M)
            tl.store(rstd + m, sigma, mask=m < M)
    h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        in_k = k < K - start
        a = tl.load(a_at, mask=in_m & in_k[None, :], other=0.0)
        if PRODUCER != "none":
            a = produced(a, gamma, beta, mu, sigma, start + k, in_k, PRODUCER, H.dtype.element_ty)
            a = tl.where(in_m & in_k[None, :], a, 0.0).to(H.dtype.element_ty)
            if tl.program_id(1) == 0:
                tl.store(out + m[:, None] * K + (start + k)[None, :], a, mask=in_m & in_k[None, :])
        p = tl.load(p_at, mask=in_k[:, None] & in_p, other=0.0).to(a.dtype)
        h = tl.dot(a, p, h, input_precision=PRECISION)
        a_at += BLOCK_K * stride_ak
        p_at += BLOCK_K * stride_pk
    tl.store(H + m[:, None] * R + r[None, :], h.to(H.dtype.element_ty), mask=in_m & in_r)


def lowrank_gemm(
    A: Tensor,  # [M, K], or [samples, M, K] with adapter
    B: Tensor,  # [K, N], a transposed weight or a weight: any strides
    bias: Tensor | None,  # [N]
    P: Tensor,  # [K, R], or [n_adapters, K, R]; any strides and floating dtype
    T: Tensor,  # [R, N], or [n_adapters, R, N]; likewise
    H: Tensor | None = None,  # [M, R], contiguous: if it is known already
    *,
    Z: Tensor | None = None,  # [M, N]
    producer: str = "none",
    adapter: Tensor | None = None,  # [samples], int64
    tile: GemmTile | None = None,
    recompute: bool | None = None,
    tma: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """(Y [M, N], H [M, R]) of the product above, in A's dtype (Y in Z's, which the GELU's slope is taken at).

    ``tile``, ``recompute`` and ``tma`` override the choice. With ``adapter`` Y is [samples, M, N], and H is of
    use inside only.
    """
    (M, K), (R, N) = A.shape[-2:], T.shape[-2:]
    samples = A.shape[0] if adapter is not None else 1
    Y = A.new_empty(*A.shape[:-1], N, dtype=A.dtype if Z is None else Z.dtype)
    if Y.numel() == 0:
        return Y, A.new_empty(*A.shape[:-1], R) if adapter is not None else project(A, P)
    transposed = B.stride(0) == 1
    if tma is None:
        tma = adapter is None and not recompute and lowrank_gemm_tma.takes(A, B.t() if transposed else B, Y)
    if recompute is None:
        recompute = H is None and Z is None and not tma and recomputes(A, R, N)
    if H is None:
        H = A.new_empty(*A.shape[:-1], R) if recompute else project(A, P, adapter=adapter)
    slope = "none" if Z is None else producer
    tile = tile or gemm_tile(A, N, rank_block(R) if recompute else 0, tma=tma, slope=slope)
    if tma:
        B = B.t() if transposed else B
        lowrank_gemm_tma.launch(A, B, bias, T, H, Z, Y, transposed=transposed, producer=producer, tile=tile)
        return Y, H
    grid = (samples * triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n),)
    with on_device(A):
        lowrank_gemm_kernel[grid](
            *(A, B, bias, P, T, H, Z, Y, adapter, 1 if adapter is None else P.shape[0], samples, M, N, K, R),
            *(*A.stride()[-2:], *B.stride(), 0 if bias is None else bias.stride(0)),
            *(*P.stride()[-2:], *T.stride()[-2:], *((0, 0) if Z is None else Z.stride())),
            *((0, 0, 0) if adapter is None else (A.stride(0), P.stride(0), T.stride(0))),
            PRODUCER=producer,
            RECOMPUTE=recompute,
            PRECISION=precision(A),
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK_K=tile.k,
            BLOCK_R=rank_block(R) if recompute else min(rank_block(R), TAIL_R),
            GROUP_M=8,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return Y, H


def project(A: Tensor, P: Tensor, *, adapter: Tensor | None = None) -> Tensor:
    """H = A P: [M, K] times [K, R] of any strides, in A's dtype. With ``adapter`` a P a sample, as in the product."""
    H = A.new_empty(*A.shape[:-1], P.shape[-1])
    _project(A, P, H, adapter=adapter)
    return H


def gelu_project(Z: Tensor, P: Tensor, producer: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(A = gelu(Z) [M, K], H = A P [M, R]) in ``dtype``; ``producer`` is "gelu" or "gelu_tanh"."""
    A, H = Z.new_empty(Z.shape, dtype=dtype), Z.new_empty(Z.shape[0], P.shape[1], dtype=dtype)
    _project(Z, P, H, producer, A)
    return A, H


def norm_project(
    X: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, P: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(A = layer norm of X [M, K], H = A P [M, R]) in ``dtype``, and the rows' mean and 1 / deviation [M] in fp32."""
    A, H = X.new_empty(X.shape, dtype=dtype), X.new_empty(X.shape[0], P.shape[1], dtype=dtype)
    mean, rstd = (X.new_empty(X.shape[0], dtype=torch.float32) for _ in range(2))
    _project(X, P, H, "norm", A, gamma, beta, mean, rstd, eps)
    return A, H, mean, rstd


def columns_and_warps(producer: str) -> tuple[int, int]:
    """BLOCK_K of a projection and its warps; a producer's arithmetic needs more registers (see the resource report)."""
    return (64, 4) if producer == "none" else (32, 8)


def _project(
    A: Tensor,
    P: Tensor,
    H: Tensor,
    producer: str = "none",
    out: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    eps: float = 0.0,
    adapter: Tensor | None = None,
) -> None:
    (M, K), R = A.shape[-2:], P.shape[-1]
    samples = A.shape[0] if adapter is not None else 1
    if samples * M == 0 or (H.numel() == 0 and out is None):
        return
    gamma, beta = (None if t is None else t.contiguous() for t in (gamma, beta))
    block_k, warps = columns_and_warps(producer)
    grid = (triton.cdiv(M, PROJECT_M), triton.cdiv(R, rank_block(R)), samples)
    with on_device(A):
        project_kernel[grid](
            *(A, P, H, out, gamma, beta, mean, rstd, eps, adapter, 1 if adapter is None else P.shape[0], M, K, R),
            *(*A.stride()[-2:], *P.stride()[-2:]),
            *((0, 0) if adapter is None else (A.stride(0), P.stride(0))),
            PRODUCER=producer,
            PRECISION=precision(H),
            BLOCK_M=PROJECT_M,
            BLOCK_K=block_k,
            BLOCK_R=rank_block(R),
            num_warps=warps,
            num_stages=PROJECT_STAGES,
        )
