"""Compute a LoRA layer with fused Triton kernels, as LoRAFusion does.

The layer computes y = x Wᵀ + b + S Bᵀ, where S = x Aᵀ [tokens, rank] is an intermediate tensor in memory. gy is the
gradient with respect to y, and dx, dA, dB and dS are the gradients with respect to x, A, B and S.

    forward    S = x Aᵀ (cuBLAS);           y = S Bᵀ + x Wᵀ + b in one kernel, whose accumulator starts from S Bᵀ
    backward   dS = gy B and dB = gyᵀ S in one kernel that reads gy once, both summed with fp32 atomics;
               dA = dSᵀ x (cuBLAS);         dx = dS A + gy W in one kernel, whose accumulator starts from dS A

LoRAFusion is at github.com/CentML/lorafusion. This is a new implementation of the same method for comparison. It has no
dropout, and the scale of the update is 1. The tile sizes are those that LoRAFusion uses on an H100.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Tile sizes of the two products with the frozen weight, for half precision. In fp32, BN is halved, because the tiles
#: would otherwise not fit in shared memory.
PRODUCT = {"BM": 128, "BN": 256, "BK": 64, "num_warps": 8, "num_stages": 3}
#: Tile sizes of the kernel that computes dS and dB.
REDUCTION = {"BM": 128, "BN": 128, "num_warps": 8, "num_stages": 3}


@triton.jit
def _product_kernel(
    a,  # [M, K]
    b,  # [K, N], with the strides stride_bk and stride_bn
    s,  # [M, R]
    t,  # [R, N], with the strides stride_tr and stride_tn
    bias,  # [N]
    out,  # [M, N]
    M,
    N,
    K,
    stride_bk,
    stride_bn,
    stride_tr,
    stride_tn,
    HAS_BIAS: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Compute out = s t + a b + bias."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    cols = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
    depth, rank = tl.arange(0, BK), tl.arange(0, R)
    row, col = rows[:, None] < M, cols[None, :] < N
    b_s = tl.load(s + rows[:, None] * R + rank[None, :], mask=row, other=0.0)
    b_t = tl.load(t + rank[:, None] * stride_tr + cols[None, :] * stride_tn, mask=col, other=0.0)
    acc = tl.dot(b_s, b_t, input_precision="ieee")
    for k in range(0, K, BK):
        inner = k + depth
        b_a = tl.load(a + rows[:, None] * K + inner[None, :], mask=row & (inner[None, :] < K), other=0.0)
        b_b = tl.load(
            b + inner[:, None] * stride_bk + cols[None, :] * stride_bn, mask=(inner[:, None] < K) & col, other=0.0
        )
        acc = tl.dot(b_a, b_b, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias + cols[None, :], mask=col, other=0.0).to(tl.float32)
    tl.store(out + rows[:, None] * N + cols[None, :], acc.to(out.dtype.element_ty), mask=row & col)


@triton.jit
def _reduction_kernel(
    gy,  # [M, N]
    s,  # [M, R]
    up,  # [N, R]
    ds,  # [M, R], fp32 zeros
    dup,  # [N, R], fp32 zeros
    M,
    N,
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute ds += gy up and dup += gyᵀ s."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    cols = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
    rank = tl.arange(0, R)
    b_gy = tl.load(gy + rows[:, None] * N + cols[None, :], mask=(rows[:, None] < M) & (cols[None, :] < N), other=0.0)
    b_up = tl.load(up + cols[:, None] * R + rank[None, :], mask=cols[:, None] < N, other=0.0)
    b_s = tl.load(s + rows[:, None] * R + rank[None, :], mask=rows[:, None] < M, other=0.0)
    b_ds = tl.dot(b_gy, b_up, input_precision="ieee")
    tl.atomic_add(ds + rows[:, None] * R + rank[None, :], b_ds, mask=rows[:, None] < M)
    b_dup = tl.dot(tl.trans(b_gy), b_s, input_precision="ieee")
    tl.atomic_add(dup + cols[:, None] * R + rank[None, :], b_dup, mask=cols[:, None] < N)


def _product(a: Tensor, b: Tensor, s: Tensor, t: Tensor, bias: Tensor | None) -> Tensor:
    """Return s t + a b + bias for contiguous a [M, K] and s [M, R], and b [K, N] and t [R, N] with any strides."""
    (m, k), n = a.shape, b.shape[1]
    out = a.new_empty(m, n)
    tiles = {**PRODUCT, "BN": PRODUCT["BN"] * 2 // a.itemsize}
    grid = (triton.cdiv(m, tiles["BM"]), triton.cdiv(n, tiles["BN"]))
    _product_kernel[grid](
        a, b, s, t, a if bias is None else bias, out, m, n, k, *b.stride(), *t.stride(), bias is not None, s.shape[1],
        **tiles,
    )  # fmt: skip
    return out


def _reduction(gy: Tensor, s: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return (gy up, gyᵀ s) in fp32."""
    (m, n), rank = gy.shape, s.shape[1]
    ds, dup = (torch.zeros(length, rank, device=gy.device, dtype=torch.float32) for length in (m, n))
    grid = (triton.cdiv(m, REDUCTION["BM"]), triton.cdiv(n, REDUCTION["BN"]))
    _reduction_kernel[grid](gy, s, up, ds, dup, m, n, rank, **REDUCTION)
    return ds, dup


class _SplitLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            s = x @ A.to(x.dtype).t()
            ctx.save_for_backward(x, W, A, B, s)
            return _product(x, W.t(), s, B.to(x.dtype).t(), b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, s = ctx.saved_tensors
        ds, dB = _reduction(gy, s, B.to(x.dtype))
        ds = ds.to(x.dtype)
        dA = (ds.t() @ x).to(A.dtype)
        return _product(gy, W, ds, A.to(x.dtype), None), None, None, dA, dB.to(B.dtype)


def split_lora(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
    """Compute y = x Wᵀ + b + (x Aᵀ) Bᵀ for contiguous operands.

    The shapes are x [tokens, d_in], W [d_out, d_in], A [rank, d_in] and B [d_out, rank]. ``rank`` must be a power of
    two and at least 16. x, A and B get gradients, and gy must be contiguous.
    """
    return _SplitLora.apply(x, W, b, A, B)
