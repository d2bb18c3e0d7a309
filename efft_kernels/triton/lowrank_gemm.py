"""Y = A B + bias + H T with H = A P: a matrix product whose accumulator also takes a rank-r product.

Both directions of tt_linear are this product:

    forward    y  = x Wᵀ + b + h G,     h  = x D      A = x,  B = Wᵀ, P = D,  T = G
    backward   dx = gy W     + dh Dᵀ,   dh = gy Gᵀ    A = gy, B = W,  P = Gᵀ, T = Dᵀ

Fused: the rank-r tail is one more product into the fp32 accumulator of the output tile, so nothing of Y's size is
written twice, read again or concatenated. H comes in one of two ways:

``recompute``  every program makes its rows of H in the main loop, from the tiles of A that it has at hand anyway. No
               second kernel and no second read of A, for r / BLOCK_N more arithmetic. The first column of programs
               stores H for the backward.
``split``      H is made by a kernel of its own (:func:`project`) that reads A once; the tail loads it.

Numbers: products in A's dtype with fp32 accumulation; P and T are cast to A's dtype as they are loaded; H is rounded to
A's dtype once, in both forms; Y is rounded once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from efft_kernels.triton.launch import GemmTile, gemm_tile, on_device, precision, rank_block, recomputes

# Rows of A that one program of the projection takes, and columns per step: it reads A once, whatever the rank.
PROJECT_M, PROJECT_K, PROJECT_WARPS, PROJECT_STAGES = 64, 64, 4, 3

# Ranks that the tail of the split form takes at once: registers beside a full accumulator are few.
TAIL_R = 32


@triton.jit
def lowrank_gemm_kernel(
    A,  # [M, K]
    B,  # [K, N]
    bias,  # [N] or None
    P,  # [K, R]
    T,  # [R, N]
    H,  # [M, R], contiguous: written if RECOMPUTE, else read
    Y,  # [M, N], contiguous
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
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * columns)
    first = group * GROUP_M
    height = tl.minimum(rows - first, GROUP_M)
    tile_m = first + (tile % (GROUP_M * columns)) % height
    tile_n = (tile % (GROUP_M * columns)) // height

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
        if tile_n == 0:
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
    tl.store(Y + m[:, None] * N + n[None, :], y.to(Y.dtype.element_ty), mask=in_m & in_n)


@triton.jit
def project_kernel(
    A,  # [M, K]
    P,  # [K, R]
    H,  # [M, R], contiguous
    M,
    K,
    R,
    stride_am,
    stride_ak,
    stride_pk,
    stride_pr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    in_m, in_r = (m < M)[:, None], (r < R)[None, :]
    a_at = A + m[:, None] * stride_am + k[None, :] * stride_ak
    p_at = P + k[:, None] * stride_pk + r[None, :] * stride_pr
    h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        in_k = k < K - start
        a = tl.load(a_at, mask=in_m & in_k[None, :], other=0.0)
        p = tl.load(p_at, mask=in_k[:, None] & in_r, other=0.0).to(a.dtype)
        h = tl.dot(a, p, h, input_precision=PRECISION)
        a_at += BLOCK_K * stride_ak
        p_at += BLOCK_K * stride_pk
    tl.store(H + m[:, None] * R + r[None, :], h.to(H.dtype.element_ty), mask=in_m & in_r)


def lowrank_gemm(
    A: Tensor,  # [M, K]
    B: Tensor,  # [K, N], a transposed weight or a weight: any strides
    bias: Tensor | None,  # [N]
    P: Tensor,  # [K, R], any strides and floating dtype
    T: Tensor,  # [R, N], likewise
    tile: GemmTile | None = None,
    recompute: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """(Y [M, N], H [M, R]) of the product above, in A's dtype; ``tile`` and ``recompute`` override the table."""
    (M, K), (R, N) = A.shape, T.shape
    H, Y = A.new_empty(M, R), A.new_empty(M, N)
    if Y.numel() == 0:
        return Y, project(A, P)
    recompute = recomputes(R) if recompute is None else recompute
    tile = tile or gemm_tile(A, N, rank_block(R) if recompute else 0)
    if not recompute:
        project(A, P, H)
    grid = (triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n),)
    with on_device(A):
        lowrank_gemm_kernel[grid](
            *(A, B, bias, P, T, H, Y, M, N, K, R),
            *(*A.stride(), *B.stride(), 0 if bias is None else bias.stride(0), *P.stride(), *T.stride()),
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


def project(A: Tensor, P: Tensor, H: Tensor | None = None) -> Tensor:
    """H = A P: [M, K] times [K, R] of any strides, in A's dtype."""
    (M, K), R = A.shape, P.shape[1]
    H = A.new_empty(M, R) if H is None else H
    if H.numel() == 0:
        return H
    grid = (triton.cdiv(M, PROJECT_M), triton.cdiv(R, rank_block(R)))
    with on_device(A):
        project_kernel[grid](
            *(A, P, H, M, K, R, *A.stride(), *P.stride()),
            PRECISION=precision(A),
            BLOCK_M=PROJECT_M,
            BLOCK_K=PROJECT_K,
            BLOCK_R=rank_block(R),
            num_warps=PROJECT_WARPS,
            num_stages=PROJECT_STAGES,
        )
    return H
