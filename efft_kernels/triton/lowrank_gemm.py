"""Compute Y = A B + bias + H T with H = A P: a matrix product and a rank-r product with one accumulator.

Both directions of tt_linear are this product:

    forward    y  = x Wᵀ + b + h G,     h  = x D      A = x,  B = Wᵀ, P = D,  T = G
    backward   dx = gy W     + dh Dᵀ,   dh = gy Gᵀ    A = gy, B = W,  P = Gᵀ, T = Dᵀ

Here W is the frozen weight of the layer, D G is its update, and gy is the gradient of y.

:func:`project` computes H in a separate kernel, which reads A once per block of up to 64 columns of H. The main kernel
then adds the rank-r product H T to the fp32 accumulator of the output tile, so it writes Y only once and never reads
it. If the layer reads the output of a producer (a GELU or a layer norm), the projection also applies the producer: it
reads the producer's input z and writes A = producer(z) and H. In the backward pass of a layer after a GELU, the
epilogue (the code after the main loop) multiplies Y by the slope of the GELU at z, so the kernel stores dz.

Two kernels compute the product. ``lowrank_gemm_kernel`` addresses its operands by pointers and accepts any strides. It
also has a grouped form, in which every sample has its own P and T. All rows that one program computes then belong
to one sample, and the number of the sample's adapter selects P and T. If this number is too large, the result is NaN.
``lowrank_gemm_tma_kernel`` is for compute capability 9.0 and newer. It moves tiles of A, B and Y through tensor-map
descriptors (TMA): the copy engine computes addresses and bounds, which saves registers. This kernel is persistent: one
program per multiprocessor computes one tile after another, so that the loads of the next tile overlap with the epilogue
of the previous one. The copy engine needs contiguous rows that begin at multiples of 16 bytes (:func:`takes`).

Products are in the dtype of A with fp32 accumulation. P and T are cast to that dtype as they are loaded. H and Y are
each rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from efft_kernels._arguments import transposed
from efft_kernels.triton.launch import (
    GemmTile,
    ceil_div,
    device,
    gemm_tile,
    on_device,
    precision,
    rank_block,
    tail_block,
)
from efft_kernels.triton.producers import gelu_slope, produced, row_statistics

# Number of rows of A per program of the projection kernel, and number of its steps whose loads are in flight.
PROJECT_M, PROJECT_STAGES = 64, 3
# Tiles are computed in groups of this many row blocks. Within a group, programs compute one column block for all row
# blocks before they begin the next column block. In this order, both operands stay in the L2 cache.
GROUP_M = 8


@triton.jit
def _place_of(tile, rows, columns, GROUP_M: tl.constexpr):
    """Return (row block, column block) of the given tile of ``rows`` times ``columns`` blocks, in groups of rows."""
    group = tile // (GROUP_M * columns)
    first = group * GROUP_M
    height = tl.minimum(rows - first, GROUP_M)
    within = tile % (GROUP_M * columns)
    return first + within % height, within // height


@triton.jit
def lowrank_gemm_kernel(
    A,  # [M, K]
    B,  # [K, N]
    bias,  # [N] or None
    T,  # [R, N]
    H,  # [M, R], contiguous
    Z,  # [M, N] or None: in the backward pass, the input of the GELU before the layer
    Y,  # [M, N], contiguous
    adapter,  # [samples] or None: which T of [n, R, N] the rows of a sample use; A is then [samples, M, K]
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
    stride_tr,
    stride_tn,
    stride_zm,
    stride_zn,
    stride_as,
    stride_ts,
    PRODUCER: tl.constexpr,  # the GELU whose slope at Z multiplies Y
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    of_sample = tl.cdiv(M, BLOCK_M)
    tile_m, tile_n = _place_of(tl.program_id(0), samples * of_sample, tl.cdiv(N, BLOCK_N), GROUP_M)
    if adapter is not None:
        sample = (tile_m // of_sample).to(tl.int64)
        tile_m = tile_m % of_sample
        which = tl.load(adapter + sample)
        A, H, Y = A + sample * stride_as, H + sample * M * R, Y + sample * M * N
        missing = which >= n_adapters
        R = tl.where((which < 0) | missing, 0, R)  # without an adapter no row of T is read
        T += which * stride_ts

    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # int64 because M * K may exceed 2^31
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    r = tl.arange(0, BLOCK_R).to(tl.int64)
    in_m, in_n = (m < M)[:, None], (n < N)[None, :]

    a_at = A + m[:, None] * stride_am + k[None, :] * stride_ak  # [BLOCK_M, BLOCK_K]
    b_at = B + k[:, None] * stride_bk + n[None, :] * stride_bn  # [BLOCK_K, BLOCK_N]
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        in_k = k < K - start
        a = tl.load(a_at, mask=in_m & in_k[None, :], other=0.0)
        b = tl.load(b_at, mask=in_k[:, None] & in_n, other=0.0)
        y = tl.dot(a, b, y, input_precision=PRECISION)
        a_at += BLOCK_K * stride_ak
        b_at += BLOCK_K * stride_bk

    for start in tl.range(0, R, BLOCK_R, num_stages=1):  # there are too few steps to use more buffers
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
def lowrank_gemm_tma_kernel(
    A,  # descriptor of [M, K] in blocks [BLOCK_M, BLOCK_K]
    B,  # descriptor of [K, N] in blocks [BLOCK_K, BLOCK_N]; if TRANSPOSED of [N, K] in blocks [BLOCK_N, BLOCK_K]
    bias,  # [N] or None
    T,  # [R, N]
    H,  # [M, R], contiguous
    Z,  # [M, N] or None: in the backward pass, the input of the GELU before the layer
    Y,  # descriptor of [M, N] in blocks [BLOCK_M, BLOCK_N // 2]
    M,
    N,
    K,
    R,
    stride_bias,
    stride_tr,
    stride_tn,
    stride_zm,
    stride_zn,
    PRODUCER: tl.constexpr,  # the GELU whose slope at Z multiplies Y
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), rows * columns, tl.num_programs(0)):
        tile_m, tile_n = _place_of(tile, rows, columns, GROUP_M)
        m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        r = tl.arange(0, BLOCK_R).to(tl.int64)
        in_m, in_n = (m < M)[:, None], (n < N)[None, :]

        y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, K, BLOCK_K):
            a = A.load([tile_m * BLOCK_M, start])  # the copy engine returns zeros beyond the edges
            if TRANSPOSED:  # noqa: SIM108  # the two values have the same type only after the branch is chosen
                b = B.load([tile_n * BLOCK_N, start]).T
            else:
                b = B.load([start, tile_n * BLOCK_N])
            y = tl.dot(a, b, y)
        for start in tl.range(0, R, BLOCK_R, num_stages=1):
            in_r = r < R - start
            h = tl.load(H + m[:, None] * R + (start + r)[None, :], mask=in_m & in_r[None, :], other=0.0)
            t_at = T + (start + r)[:, None] * stride_tr + n[None, :] * stride_tn
            t = tl.load(t_at, mask=in_r[:, None] & in_n, other=0.0)
            y = tl.dot(h, t.to(h.dtype), y)

        # The epilogue processes the two halves of the columns in turn, which halves its staging memory and registers.
        halves = tl.split(tl.permute(tl.reshape(y, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        for half in tl.static_range(2):
            column = tile_n * BLOCK_N + half * (BLOCK_N // 2)
            y_half = halves[half]
            n_half = column.to(tl.int64) + tl.arange(0, BLOCK_N // 2)
            in_half = n_half < N
            if bias is not None:
                y_half += tl.load(bias + n_half * stride_bias, mask=in_half, other=0.0)[None, :].to(tl.float32)
            if Z is not None:
                z_at = Z + m[:, None] * stride_zm + n_half[None, :] * stride_zn
                z = tl.load(z_at, mask=in_m & in_half[None, :], other=0.0)
                y_half *= gelu_slope(z, PRODUCER, Y.dtype)
            Y.store([tile_m * BLOCK_M, column], y_half.to(Y.dtype))


@triton.jit
def project_kernel(
    A,  # [M, K]
    P,  # [K, R]
    H,  # [M, R], contiguous
    out,  # [M, K], contiguous, or None: the output of the producer
    gamma,  # [K] or None
    beta,  # [K] or None
    mean,  # [M] or None, output
    rstd,  # [M] or None, output
    eps,
    adapter,  # [samples] or None: which P of [n, K, R] the rows of a sample use; A is then [samples, M, K]
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
    T: Tensor,  # [R, N], or [n_adapters, R, N]; any strides and floating dtype
    H: Tensor | None = None,  # [M, R], contiguous, if the caller has computed it already
    *,
    Z: Tensor | None = None,  # [M, N]
    producer: str = "none",
    adapter: Tensor | None = None,  # [samples], int64
    tile: GemmTile | None = None,
    tma: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (Y [M, N], H [M, R]) of the product described above, in the dtype of A.

    With ``Z``, Y is multiplied by the slope at Z of the GELU ``producer``, and has the dtype of Z. With ``adapter``, Y
    is [samples, M, N] and H is [samples, M, R]. ``tile`` and ``tma`` override the automatic choice.
    """
    (M, K), (R, N) = A.shape[-2:], T.shape[-2:]
    samples = A.shape[0] if adapter is not None else 1
    Y = torch.empty(*A.shape[:-1], N, dtype=A.dtype if Z is None else Z.dtype, device=A.device)
    if H is None:
        H = project(A, P, adapter=adapter)
    if Y.numel() == 0:
        return Y, H
    is_transposed = B.stride(0) == 1
    stored = transposed(B) if is_transposed else B
    if tma is None:
        tma = adapter is None and takes(A, stored, Y)
    tile = tile or gemm_tile(A, N, tma=tma, slope="none" if Z is None else producer)
    if tma:
        _launch_tma(A, stored, bias, T, H, Z, Y, is_transposed=is_transposed, producer=producer, tile=tile)
        return Y, H
    grid = (samples * ceil_div(M, tile.m) * ceil_div(N, tile.n),)
    with on_device(A):
        lowrank_gemm_kernel[grid](
            *(A, B, bias, T, H, Z, Y, adapter, 1 if adapter is None else T.shape[0], samples, M, N, K, R),
            *(*A.stride()[-2:], *B.stride(), 0 if bias is None else bias.stride(0)),
            *(*T.stride()[-2:], *((0, 0) if Z is None else Z.stride())),
            *((0, 0) if adapter is None else (A.stride(0), T.stride(0))),
            PRODUCER=producer,
            PRECISION=precision(A),
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK_K=tile.k,
            BLOCK_R=tail_block(R),
            GROUP_M=GROUP_M,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return Y, H


def takes(*matrices: Tensor) -> bool:
    """Return whether the kernel with TMA can run: the GPU has the copy engine, and it can move tiles of the matrices.

    GPUs have the engine from compute capability 9.0 on. The matrices [rows, columns] must be in half precision, with
    contiguous rows that begin at multiples of 16 bytes.
    """
    return device(matrices[0].device).capability >= 9 and all(
        t.element_size() == 2 and t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0 and t.numel() > 0
        for t in matrices
    )


def _launch_tma(
    A: Tensor,  # [M, K]
    B: Tensor,  # [K, N] or, transposed, [N, K]
    bias: Tensor | None,  # [N]
    T: Tensor,  # [R, N]
    H: Tensor,  # [M, R]
    Z: Tensor | None,  # [M, N]
    Y: Tensor,  # [M, N]
    *,
    is_transposed: bool,
    producer: str,
    tile: GemmTile,
) -> None:
    """Run the kernel with TMA on A, B and Y, for which :func:`takes` must be true."""
    (M, K), (R, N) = A.shape, T.shape
    grid = (min(device(A.device).processors, ceil_div(M, tile.m) * ceil_div(N, tile.n)),)
    with on_device(A):
        lowrank_gemm_tma_kernel[grid](
            TensorDescriptor.from_tensor(A, [tile.m, tile.k]),
            TensorDescriptor.from_tensor(B, [tile.n, tile.k] if is_transposed else [tile.k, tile.n]),
            *(bias, T, H, Z, TensorDescriptor.from_tensor(Y, [tile.m, tile.n // 2]), M, N, K, R),
            *(0 if bias is None else bias.stride(0), *T.stride(), *((0, 0) if Z is None else Z.stride())),
            PRODUCER=producer,
            TRANSPOSED=is_transposed,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK_K=tile.k,
            BLOCK_R=tail_block(R),
            GROUP_M=GROUP_M,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


def project(A: Tensor, P: Tensor, *, adapter: Tensor | None = None) -> Tensor:
    """Return H = A P, [M, K] times [K, R] with any strides, in the dtype of A; with ``adapter``, one P per sample."""
    H = torch.empty(*A.shape[:-1], P.shape[-1], dtype=A.dtype, device=A.device)
    _project(A, P, H, adapter=adapter)
    return H


def gelu_project(Z: Tensor, P: Tensor, producer: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (A = gelu(Z) [M, K], H = A P [M, R]) in ``dtype``; ``producer`` is "gelu" or "gelu_tanh"."""
    A, H = Z.new_empty(Z.shape, dtype=dtype), Z.new_empty(Z.shape[0], P.shape[1], dtype=dtype)
    _project(Z, P, H, producer, A)
    return A, H


def norm_project(
    X: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, P: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (A, H, mean, rstd): A = layer norm of X [M, K] and H = A P [M, R] in ``dtype``, statistics [M] in fp32."""
    A, H = X.new_empty(X.shape, dtype=dtype), X.new_empty(X.shape[0], P.shape[1], dtype=dtype)
    mean, rstd = (X.new_empty(X.shape[0], dtype=torch.float32) for _ in range(2))
    _project(X, P, H, "norm", A, gamma, beta, mean, rstd, eps)
    return A, H, mean, rstd


def columns_and_warps(producer: str) -> tuple[int, int]:
    """Return BLOCK_K and the number of warps of a projection.

    With a producer, more warps process smaller blocks, because each thread then needs more registers (according to
    ``python -m tests.efft_kernels.triton.resource_report``).
    """
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
    grid = (ceil_div(M, PROJECT_M), ceil_div(R, rank_block(R)), samples)
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
