"""Compute W ← W + sign · (D G)ᵀ in fp32, rounded once to W's dtype, without a temporary tensor of W's size."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from efft_kernels.triton.launch import ceil_div, on_device

BLOCK, BLOCK_R, WARPS = 64, 32, 4


@triton.jit
def merge_kernel(
    W,  # [d_out, d_in]; W, D and G may have any strides
    D,  # [d_in, R]
    G,  # [R, d_out]
    sign,
    d_out,
    d_in,
    R,
    stride_wo,
    stride_wi,
    stride_di,
    stride_dr,
    stride_gr,
    stride_go,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_o, in_i = o < d_out, i < d_in
    update = tl.zeros((BLOCK, BLOCK), tl.float32)  # [o, i]
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        in_r = r < R
        g_at = G + r[:, None] * stride_gr + o[None, :] * stride_go
        d_at = D + i[:, None] * stride_di + r[None, :] * stride_dr
        g = tl.load(g_at, mask=in_r[:, None] & in_o[None, :], other=0.0).to(tl.float32)
        d = tl.load(d_at, mask=in_i[:, None] & in_r[None, :], other=0.0).to(tl.float32)
        update = tl.dot(tl.trans(g), tl.trans(d), update, input_precision="ieee")
    at = W + o[:, None] * stride_wo + i[None, :] * stride_wi
    mask = in_o[:, None] & in_i[None, :]
    w = tl.load(at, mask=mask, other=0.0).to(tl.float32) + sign * update
    tl.store(at, w.to(W.dtype.element_ty), mask=mask)


def tt_merge_(W: Tensor, D: Tensor, G: Tensor, sign: float) -> None:
    # W [d_out, d_in], D [d_in, R], G [R, d_out]
    (d_out, d_in), R = W.shape, D.shape[1]
    if W.numel():
        with on_device(W):
            merge_kernel[(ceil_div(d_out, BLOCK), ceil_div(d_in, BLOCK))](
                *(W, D, G, sign, d_out, d_in, R, *W.stride(), *D.stride(), *G.stride()),
                BLOCK=BLOCK,
                BLOCK_R=BLOCK_R,
                num_warps=WARPS,
            )
