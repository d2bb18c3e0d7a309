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

The sums of two layers with the same tokens can share both launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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
    sums,  # [N], fp32, receives the sum of wide if NEED_SUMS is set
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
    NEED_SUMS: tl.constexpr,
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
        if NEED_SUMS:
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
    if NEED_SUMS:  # noqa: SIM102  # this condition is evaluated at compile time, the inner one at run time
        if rank == 0:
            tl.store(sums + n, of_rows, mask=in_n)


@triton.jit
def _reduce_layer(
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
    columns_out,  # number of column blocks of gy; 0 if dG is not needed
    column,  # index of this program's block of columns of gy or x
    TOKENS,  # tokens per split, a multiple of BLOCK_M
    NEED_DB: tl.constexpr,
    PRODUCER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    split, rank = tl.program_id(1).to(tl.int64), tl.program_id(2)
    begin = split * TOKENS
    n = R * (d_out + d_in)
    if NEED_DB:
        n += d_out
    dG = partial + split * n
    dD = dG + R * d_out
    db = dD + d_in * R
    if column < columns_out:
        _sum_over_tokens(
            *(gy, None, None, None, None, h, dG, db, M, d_out, R, stride_gm, stride_gn, 1, d_out),
            *(begin, column, rank, TOKENS, NEED_DB, "none", PRECISION, BLOCK_M, BLOCK_N, BLOCK_R),
        )
    else:
        _sum_over_tokens(
            *(x, gamma, beta, mean, rstd, dh, dD, db, M, d_in, R, stride_xm, stride_xn, R, 1),
            *(begin, column - columns_out, rank, TOKENS, False, PRODUCER, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R),
        )


@triton.jit
def reduce_tokens_kernel(
    gy,
    h,
    x,
    gamma,
    beta,
    mean,
    rstd,
    dh,
    partial,
    M,
    d_out,
    d_in,
    R,
    stride_gm,
    stride_gn,
    stride_xm,
    stride_xn,
    columns_out,
    TOKENS,
    NEED_DB: tl.constexpr,
    PRODUCER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Compute the partial sums of one layer. ``_reduce_layer`` explains the arguments."""
    _reduce_layer(
        *(gy, h, x, gamma, beta, mean, rstd, dh, partial, M, d_out, d_in, R),
        *(stride_gm, stride_gn, stride_xm, stride_xn, columns_out, tl.program_id(0), TOKENS),
        *(NEED_DB, PRODUCER, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R),
    )


@triton.jit
def reduce_two_kernel(
    first,  # the arguments of _reduce_layer from gy to columns_out, for the first layer
    second,  # the same for the second layer
    columns,  # number of column blocks of the first layer
    TOKENS,
    FIRST_NEEDS_DB: tl.constexpr,
    FIRST_PRODUCER: tl.constexpr,
    SECOND_NEEDS_DB: tl.constexpr,
    SECOND_PRODUCER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Compute the partial sums of two layers."""
    column = tl.program_id(0)
    if column < columns:
        _reduce_layer(*first, column, TOKENS, FIRST_NEEDS_DB, FIRST_PRODUCER, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R)
    else:
        _reduce_layer(
            *second, column - columns, TOKENS, SECOND_NEEDS_DB, SECOND_PRODUCER, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R
        )


@triton.jit
def _finish_layer(partial, dG, dD, db, n_G, n_D, n_b, splits, block, BLOCK: tl.constexpr):
    n = n_G + n_D + n_b
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        total += tl.load(partial + i, mask=i < n, other=0.0)
        partial += n
    tl.store(dG + i, total, mask=i < n_G)
    tl.store(dD + (i - n_G), total, mask=(i >= n_G) & (i < n_G + n_D))
    tl.store(db + (i - n_G - n_D), total, mask=(i >= n_G + n_D) & (i < n))


@triton.jit
def finish_kernel(partial, dG, dD, db, n_G, n_D, n_b, splits, BLOCK: tl.constexpr):
    """Sum ``partial`` [splits, n_G + n_D + n_b] over the splits into dG, dD and db of n_G, n_D and n_b elements."""
    _finish_layer(partial, dG, dD, db, n_G, n_D, n_b, splits, tl.program_id(0), BLOCK)


@triton.jit
def finish_two_kernel(first, second, blocks, splits, BLOCK: tl.constexpr):
    """Do for two layers what finish_kernel does for one. ``first`` and ``second`` are its arguments up to n_b.

    ``blocks`` is the number of programs for the first layer.
    """
    block = tl.program_id(0)
    if block < blocks:
        _finish_layer(*first, splits, block, BLOCK)
    else:
        _finish_layer(*second, splits, block - blocks, BLOCK)


class Layer(NamedTuple):
    """Hold the tensors from which the sums of one layer are computed, and what is needed.

    dG needs ``gy`` and ``h``, dD needs ``x`` and ``dh``, and db needs ``gy``. dG is not computed if ``h`` is None, and
    dD is not computed if ``dh`` is None. With a ``producer`` (see :mod:`efft_kernels.triton.producers`), ``x`` is the
    input of the producer.
    """

    gy: Tensor | None  # [M, d_out]
    h: Tensor | None  # [M, R]
    x: Tensor | None  # [M, d_in]
    dh: Tensor | None  # [M, R]
    need_db: bool = False
    producer: str = "none"
    gamma: Tensor | None = None  # [d_in]
    beta: Tensor | None = None  # [d_in]
    mean: Tensor | None = None  # [M]
    rstd: Tensor | None = None  # [M]


#: dG [R, d_out], dD [d_in, R] and db [d_out] in fp32. A gradient that is not needed has the shape [0].
Sums = tuple[Tensor, Tensor, Tensor]


def reduce_tokens(*layers: Layer, splits: int | None = None) -> list[Sums]:
    """Return the sums of one or two layers. The sums of two layers are computed in the same launches.

    Both layers must have the same number of tokens. ``splits``, the number of ranges of tokens, overrides the automatic
    choice.
    """
    sums = [_empty_sums(layer) for layer in layers]
    pairs = [pair for pair in zip(layers, sums, strict=True) if pair[0].h is not None or pair[0].dh is not None]
    if pairs:
        _launch([layer for layer, _ in pairs], [of for _, of in pairs], splits)
    for layer, (_, _, db) in zip(layers, sums, strict=True):
        if layer.need_db and not _adds_gy(layer):
            assert layer.gy is not None
            torch.sum(layer.gy, 0, dtype=torch.float32, out=db)
    return sums


def _empty_sums(layer: Layer) -> Sums:
    gy, h, x, dh = layer[:4]
    like = x if gy is None else gy
    assert like is not None
    shapes = (
        (0,) if h is None or gy is None else (h.shape[1], gy.shape[1]),
        (0,) if dh is None or x is None else (x.shape[1], dh.shape[1]),
        (gy.shape[1] if layer.need_db and gy is not None else 0,),
    )
    dG, dD, db = [torch.empty(shape, dtype=torch.float32, device=like.device) for shape in shapes]
    return dG, dD, db


def _launch(layers: Sequence[Layer], sums: Sequence[Sums], splits: int | None) -> None:
    """Compute dG and dD of one or two layers, and db of those that need dG, into ``sums``."""
    like = _given(layers[0])
    M, R = like.shape[0], max([_given(layer).shape[1] for layer in layers])
    block_n, warps = min([columns_and_warps(layer.producer) for layer in layers])
    block_r = rank_block(R)
    columns = [[ceil_div(d, block_n) for d in _sizes(*each)] for each in zip(layers, sums, strict=True)]
    total, ranks = sum([of_gy + of_x for of_gy, of_x in columns]), ceil_div(R, block_r)
    if total * ranks == 0:
        return
    if splits is None:
        splits = PROGRAMS_A_PROCESSOR * device(like.device).processors // max(total * ranks, 1)
        splits = max(1, min(splits, ceil_div(M, 4 * BLOCK_M)))
    tokens = ceil_div(ceil_div(M, splits), BLOCK_M) * BLOCK_M
    results = [_results(layer, of, splits) for layer, of in zip(layers, sums, strict=True)]
    operands = [
        (*_operands(layer, of, partial), of_gy)
        for layer, of, (partial, *_), (of_gy, _) in zip(layers, sums, results, columns, strict=True)
    ]
    blocks = [ceil_div(partial.shape[1], FINISH_BLOCK) for partial, *_ in results]
    adds = [_adds_gy(layer) for layer in layers]
    grid, producers = (total, splits, ranks), [layer.producer for layer in layers]
    options: Any = {
        **{"PRECISION": precision(like), "BLOCK_M": BLOCK_M, "BLOCK_N": block_n, "BLOCK_R": block_r},
        **{"num_warps": warps, "num_stages": STAGES},
    }
    finish: Any = {"BLOCK": FINISH_BLOCK, "num_warps": FINISH_WARPS}
    with on_device(like):
        if len(layers) == 1:
            reduce_tokens_kernel[grid](*operands[0], tokens, NEED_DB=adds[0], PRODUCER=producers[0], **options)
            finish_kernel[(blocks[0],)](*results[0], splits, **finish)
        else:
            reduce_two_kernel[grid](
                *(*operands, sum(columns[0]), tokens),
                FIRST_NEEDS_DB=adds[0],
                FIRST_PRODUCER=producers[0],
                SECOND_NEEDS_DB=adds[1],
                SECOND_PRODUCER=producers[1],
                **options,
            )
            finish_two_kernel[(sum(blocks),)](*results, blocks[0], splits, **finish)


def _given(layer: Layer) -> Tensor:
    """Return h or dh, whichever the layer has."""
    given = layer.dh if layer.h is None else layer.h
    assert given is not None
    return given


def _adds_gy(layer: Layer) -> bool:
    """Return whether the kernels compute db. They sum gy only where they compute an entry of dG."""
    return layer.need_db and layer.h is not None and layer.h.shape[1] > 0


def _sizes(layer: Layer, sums: Sums) -> tuple[int, int]:
    """Return d_out and d_in, or 0 for a product that is not needed."""
    dG, dD, _ = sums
    return 0 if layer.h is None else dG.shape[1], 0 if layer.dh is None else dD.shape[0]


def _results(layer: Layer, sums: Sums, splits: int) -> tuple[Any, ...]:
    """Return the arguments of ``finish_kernel`` up to n_b."""
    dG, dD, db = sums
    n_G, n_D, n_b = dG.numel(), dD.numel(), db.numel() if _adds_gy(layer) else 0
    partial = torch.empty(splits, n_G + n_D + n_b, dtype=torch.float32, device=dG.device)
    return partial, dG, dD, db, n_G, n_D, n_b


def _operands(layer: Layer, sums: Sums, partial: Tensor) -> tuple[Any, ...]:
    """Return the arguments of ``_reduce_layer`` from gy to stride_xn."""
    like = _given(layer)
    gy, h, x, dh = [like if t is None else t for t in layer[:4]]  # no kernel reads these substitutes
    # project and lowrank_gemm return contiguous tensors, which are not copied here.
    h, dh = h.contiguous(), dh.contiguous()
    gamma, beta = [None if t is None else t.contiguous() for t in (layer.gamma, layer.beta)]
    M, R = like.shape
    return (
        *(gy, h, x, gamma, beta, layer.mean, layer.rstd, dh, partial, M, *_sizes(layer, sums), R),
        *(*gy.stride(), *x.stride()),
    )
