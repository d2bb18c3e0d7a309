"""The product of :mod:`efft_kernels.triton.lowrank_gemm` for compute capability 9.0 and newer: persistent, with TMA.

The same equation and rounding, always in the split form: on an H100 the thin products of recomputing H in the main loop
take longer than a kernel of its own for H. What differs is how tiles move: A, B and Y go through tensor-map
descriptors, so that the copy engine computes addresses and bounds instead of registers, and one program a
multiprocessor takes tile after tile, so that loads of the next tile run under the epilogue of the last. H, T and the
bias are small, T in the factor's own dtype, and stay with pointers.

TMA wants rows that are contiguous and begin at multiples of 16 bytes (:func:`takes`); anything else, and the grouped
form, uses the pointer kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from efft_kernels.triton.launch import TAIL_R, GemmTile, device, on_device, rank_block
from efft_kernels.triton.producers import gelu_slope


@triton.jit
def lowrank_gemm_tma_kernel(
    A,  # descriptor of [M, K] in blocks [BLOCK_M, BLOCK_K]
    B,  # descriptor of [K, N] in blocks [BLOCK_K, BLOCK_N]; if TRANSPOSED of [N, K] in blocks [BLOCK_N, BLOCK_K]
    bias,  # [N] or None
    T,  # [R, N]
    H,  # [M, R], contiguous
    Z,  # [M, N] or None: what the GELU in front of the layer got, in the backward
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
    PRODUCER: tl.constexpr,  # of Z
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), rows * columns, tl.num_programs(0)):
        group = tile // (GROUP_M * columns)
        first = group * GROUP_M
        height = tl.minimum(rows - first, GROUP_M)
        tile_m = first + (tile % (GROUP_M * columns)) % height
        tile_n = (tile % (GROUP_M * columns)) // height

        m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        r = tl.arange(0, BLOCK_R).to(tl.int64)
        in_m, in_n = (m < M)[:, None], (n < N)[None, :]

        y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, K, BLOCK_K):
            a = A.load([tile_m * BLOCK_M, start])  # zeros beyond the edges, by the copy engine
            if TRANSPOSED:  # noqa: SIM108  # the two have one type only after the branch is chosen
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

        # The epilogue takes half of the columns after the other: half of the staging and of the slope's registers.
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


def takes(*matrices: Tensor) -> bool:
    """Whether the copy engine is there (from compute capability 9.0) and can move tiles of these [rows, columns].

    It wants half precision and rows that are contiguous and begin at multiples of 16 bytes.
    """
    return device(matrices[0].device).capability >= 9 and all(
        t.element_size() == 2 and t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0 and t.numel() > 0
        for t in matrices
    )


def launch(
    A: Tensor,  # [M, K]
    B: Tensor,  # [K, N] or, transposed, [N, K]
    bias: Tensor | None,  # [N]
    T: Tensor,  # [R, N]
    H: Tensor,  # [M, R]
    Z: Tensor | None,  # [M, N]
    Y: Tensor,  # [M, N]
    *,
    transposed: bool,
    producer: str,
    tile: GemmTile,
) -> None:
    """Run the kernel; all of A, B and Y must be such that :func:`takes` them."""
    (M, K), (R, N) = A.shape, T.shape
    grid = (min(device(A.device).processors, triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n)),)
    with on_device(A):
        lowrank_gemm_tma_kernel[grid](
            TensorDescriptor.from_tensor(A, [tile.m, tile.k]),
            TensorDescriptor.from_tensor(B, [tile.n, tile.k] if transposed else [tile.k, tile.n]),
            *(bias, T, H, Z, TensorDescriptor.from_tensor(Y, [tile.m, tile.n // 2]), M, N, K, R),
            *(0 if bias is None else bias.stride(0), *T.stride(), *((0, 0) if Z is None else Z.stride())),
            PRODUCER=producer,
            TRANSPOSED=transposed,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK_K=tile.k,
            BLOCK_R=min(rank_block(R), TAIL_R),
            GROUP_M=8,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
