"""Compute G[l] = scale · [C[l, 0] V | C[l, 1] V | ...] for all layers in one launch, and dC and dV in another.

    dC[l, c] = scale · keep_C[l, c] ∘ (dG[l, c] (keep_V[l] ∘ V)ᵀ)
    dV       = scale · Σ_l keep_V[l] ∘ Σ_c (keep_C[l, c] ∘ C[l, c])ᵀ dG[l, c]

C[l, c] is core c of layer l, V is the right factor that all layers share, keep_C and keep_V are the dropout masks of C
and V, and ∘ multiplies element by element.

Factors are small, and rounding them would round the update. All computations are therefore in fp32 without tensor
cores, for any dtype of the factors. The kernels are fast because one launch computes all layers. The kernels
read the dropout masks, one byte per element, and never store masked copies of the factors. Sums run in a fixed order,
so every run returns exactly the same result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from efft_kernels.triton.launch import ceil_div, on_device

# Sizes of the blocks along the ranks and along the columns of V; eight warps have enough registers for these blocks.
# STAGES = 1 means that loads are not pipelined.
BLOCK_R, BLOCK_N, WARPS, STAGES = 32, 64, 8, 1


@triton.jit
def _masked(values, keep, at, mask):
    """Return ``values`` in fp32, with zeros where the dropout mask ``keep`` (if any) is False at the offsets ``at``."""
    values = values.to(tl.float32)
    if keep is not None:
        values = tl.where(tl.load(keep + at, mask=mask, other=0) != 0, values, 0.0)
    return values


@triton.jit
def contract_kernel(
    C,  # [n_layers, n_cores, r1, r2]
    V,  # [r2, d_out]
    keep_C,  # like C, or None
    keep_V,  # [n_layers, r2, d_out], or None
    G,  # [n_layers, r1, n_cores * d_out], contiguous
    scale,
    n_cores,
    r1,
    r2,
    d_out,
    stride_cl,
    stride_cc,
    stride_ci,
    stride_cj,
    stride_vj,
    stride_vn,
    stride_kl,
    stride_kc,
    stride_ki,
    stride_kj,
    stride_ml,
    stride_mj,
    stride_mn,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    core = tl.program_id(2)  # the number of the core among those of all layers
    layer, c = (core // n_cores).to(tl.int64), (core % n_cores).to(tl.int64)
    i = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_i, in_n = (i < r1)[:, None], (n < d_out)[None, :]
    G_block = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for start in range(0, r2, BLOCK_R):
        j = start + tl.arange(0, BLOCK_R)
        in_c, in_v = in_i & (j < r2)[None, :], (j < r2)[:, None] & in_n
        cores = tl.load(
            C + layer * stride_cl + c * stride_cc + i[:, None] * stride_ci + j[None, :] * stride_cj,
            mask=in_c,
            other=0.0,
        )
        right = tl.load(V + j[:, None] * stride_vj + n[None, :] * stride_vn, mask=in_v, other=0.0)
        at_c = layer * stride_kl + c * stride_kc + i[:, None] * stride_ki + j[None, :] * stride_kj
        at_v = layer * stride_ml + j[:, None] * stride_mj + n[None, :] * stride_mn
        cores, right = _masked(cores, keep_C, at_c, in_c), _masked(right, keep_V, at_v, in_v)
        G_block = tl.dot(cores, right, G_block, input_precision="ieee")
    at = G + ((layer * r1 + i[:, None]) * n_cores + c) * d_out + n[None, :]
    tl.store(at, (scale * G_block).to(G.dtype.element_ty), mask=in_i & in_n)


@triton.jit
def _gradient_of_core(
    program,
    dG,
    V,
    keep_C,
    keep_V,
    dC,
    scale,
    n_cores,
    r1,
    r2,
    d_out,
    stride_gl,
    stride_gc,
    stride_gi,
    stride_gn,
    stride_vj,
    stride_vn,
    stride_kl,
    stride_kc,
    stride_ki,
    stride_kj,
    stride_ml,
    stride_mj,
    stride_mn,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute one block [i, j] of the gradient of one core, a sum over d_out."""
    blocks_i, blocks_j = tl.cdiv(r1, BLOCK_R), tl.cdiv(r2, BLOCK_R)
    block = program % (blocks_i * blocks_j)
    core = program // (blocks_i * blocks_j)
    layer, c = (core // n_cores).to(tl.int64), (core % n_cores).to(tl.int64)
    i = block // blocks_j * BLOCK_R + tl.arange(0, BLOCK_R)
    j = block % blocks_j * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
    for start in range(0, d_out, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        in_g, in_v = (i < r1)[:, None] & (n < d_out)[None, :], (j < r2)[:, None] & (n < d_out)[None, :]
        g_at = dG + layer * stride_gl + c * stride_gc + i[:, None] * stride_gi + n[None, :] * stride_gn
        g = tl.load(g_at, mask=in_g, other=0.0).to(tl.float32)
        right = tl.load(V + j[:, None] * stride_vj + n[None, :] * stride_vn, mask=in_v, other=0.0)
        at_v = layer * stride_ml + j[:, None] * stride_mj + n[None, :] * stride_mn
        right = _masked(right, keep_V, at_v, in_v)
        total = tl.dot(g, tl.trans(right), total, input_precision="ieee")
    in_c = (i < r1)[:, None] & (j < r2)[None, :]
    at_c = layer * stride_kl + c * stride_kc + i[:, None] * stride_ki + j[None, :] * stride_kj
    total = _masked(scale * total, keep_C, at_c, in_c)
    at = dC + (core.to(tl.int64) * r1 + i[:, None]) * r2 + j[None, :]
    tl.store(at, total.to(dC.dtype.element_ty), mask=in_c)


@triton.jit
def _gradient_of_right(
    block,
    dG,
    C,
    keep_C,
    keep_V,
    dV,
    scale,
    n_layers,
    n_cores,
    r1,
    r2,
    d_out,
    stride_gl,
    stride_gc,
    stride_gi,
    stride_gn,
    stride_cl,
    stride_cc,
    stride_ci,
    stride_cj,
    stride_kl,
    stride_kc,
    stride_ki,
    stride_kj,
    stride_ml,
    stride_mj,
    stride_mn,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute one block [j, n] of dV, a sum over layers, cores and r1."""
    blocks_i, blocks_j = tl.cdiv(r1, BLOCK_R), tl.cdiv(r2, BLOCK_R)
    j = block % blocks_j * BLOCK_R + tl.arange(0, BLOCK_R)
    n = block // blocks_j * BLOCK_N + tl.arange(0, BLOCK_N)
    in_v = (j < r2)[:, None] & (n < d_out)[None, :]
    total = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    zero = tl.full((), 0, tl.int64)  # int64 because offsets of layers may exceed 2^31
    for index in range(0, n_layers):
        layer = zero + index
        of_layer = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        for part in range(0, n_cores * blocks_i):
            c = part // blocks_i
            i = part % blocks_i * BLOCK_R + tl.arange(0, BLOCK_R)
            in_c, in_g = (i < r1)[:, None] & (j < r2)[None, :], (i < r1)[:, None] & (n < d_out)[None, :]
            c_at = C + layer * stride_cl + c * stride_cc + i[:, None] * stride_ci + j[None, :] * stride_cj
            at_c = layer * stride_kl + c * stride_kc + i[:, None] * stride_ki + j[None, :] * stride_kj
            cores = _masked(tl.load(c_at, mask=in_c, other=0.0), keep_C, at_c, in_c)
            g_at = dG + layer * stride_gl + c * stride_gc + i[:, None] * stride_gi + n[None, :] * stride_gn
            g = tl.load(g_at, mask=in_g, other=0.0).to(tl.float32)
            of_layer = tl.dot(tl.trans(cores), g, of_layer, input_precision="ieee")
        at_v = layer * stride_ml + j[:, None] * stride_mj + n[None, :] * stride_mn
        total += _masked(of_layer, keep_V, at_v, in_v)
    tl.store(dV + j[:, None] * d_out + n[None, :], (scale * total).to(dV.dtype.element_ty), mask=in_v)


@triton.jit
def contract_backward_kernel(
    dG,  # [n_layers, n_cores, r1, d_out] of any strides
    C,  # [n_layers, n_cores, r1, r2]
    V,  # [r2, d_out]
    keep_C,  # like C, or None
    keep_V,  # [n_layers, r2, d_out], or None
    dC,  # like C, contiguous
    dV,  # [r2, d_out], contiguous
    scale,
    n_layers,
    n_cores,
    r1,
    r2,
    d_out,
    stride_gl,
    stride_gc,
    stride_gi,
    stride_gn,
    stride_cl,
    stride_cc,
    stride_ci,
    stride_cj,
    stride_vj,
    stride_vn,
    stride_kl,
    stride_kc,
    stride_ki,
    stride_kj,
    stride_ml,
    stride_mj,
    stride_mn,
    programs_dC,  # the first programs_dC programs compute dC, and the other ones compute dV
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0)
    if program < programs_dC:
        _gradient_of_core(
            *(program, dG, V, keep_C, keep_V, dC, scale, n_cores, r1, r2, d_out),
            *(stride_gl, stride_gc, stride_gi, stride_gn, stride_vj, stride_vn),
            *(stride_kl, stride_kc, stride_ki, stride_kj, stride_ml, stride_mj, stride_mn, BLOCK_R, BLOCK_N),
        )
    else:
        _gradient_of_right(
            *(program - programs_dC, dG, C, keep_C, keep_V, dV, scale, n_layers, n_cores, r1, r2, d_out),
            *(stride_gl, stride_gc, stride_gi, stride_gn, stride_cl, stride_cc, stride_ci, stride_cj),
            *(stride_kl, stride_kc, stride_ki, stride_kj, stride_ml, stride_mj, stride_mn, BLOCK_R, BLOCK_N),
        )


def tt_contract_fwd(
    C: Tensor,  # [n_layers, n_cores, r1, r2]
    V: Tensor,  # [r2, d_out]
    keep_C: Tensor | None,  # [n_layers, n_cores, r1, r2], bool
    keep_V: Tensor | None,  # [n_layers, r2, d_out], bool
    scale: float,
) -> Tensor:  # [n_layers, r1, n_cores * d_out]
    (n_layers, n_cores, r1, r2), d_out = C.shape, V.shape[1]
    G = C.new_empty(n_layers, r1, n_cores * d_out)
    if G.numel():
        grid = (ceil_div(d_out, BLOCK_N), ceil_div(r1, BLOCK_R), n_layers * n_cores)
        with on_device(C):
            contract_kernel[grid](
                *(C, V, _bytes(keep_C), _bytes(keep_V), G, scale, n_cores, r1, r2, d_out),
                *(*C.stride(), *V.stride(), *_strides(keep_C, 4), *_strides(keep_V, 3)),
                BLOCK_R=BLOCK_R,
                BLOCK_N=BLOCK_N,
                num_warps=WARPS,
                num_stages=STAGES,
            )
    return G


def tt_contract_bwd(
    dG: Tensor,  # [n_layers, r1, n_cores * d_out]
    C: Tensor,
    V: Tensor,
    keep_C: Tensor | None,
    keep_V: Tensor | None,
    scale: float,
    need_dC: bool,
    need_dV: bool,
) -> tuple[Tensor, Tensor]:
    (n_layers, n_cores, r1, r2), d_out = C.shape, V.shape[1]
    dC, dV = C.new_empty(C.shape if need_dC else 0), V.new_empty(V.shape if need_dV else 0)
    blocks_j = ceil_div(r2, BLOCK_R)
    programs_dC = n_layers * n_cores * ceil_div(r1, BLOCK_R) * blocks_j if need_dC else 0
    programs_dV = blocks_j * ceil_div(d_out, BLOCK_N) if need_dV else 0
    if programs_dC + programs_dV:
        dG = dG.unflatten(2, (n_cores, d_out)).transpose(1, 2)  # [n_layers, n_cores, r1, d_out]
        with on_device(C):
            contract_backward_kernel[(programs_dC + programs_dV,)](
                *(dG, C, V, _bytes(keep_C), _bytes(keep_V), dC, dV, scale, n_layers, n_cores, r1, r2, d_out),
                *(*dG.stride(), *C.stride(), *V.stride(), *_strides(keep_C, 4), *_strides(keep_V, 3), programs_dC),
                BLOCK_R=BLOCK_R,
                BLOCK_N=BLOCK_N,
                num_warps=WARPS,
                num_stages=STAGES,
            )
    return dC, dV


def _bytes(mask: Tensor | None) -> Tensor | None:
    """View a bool mask as bytes, without a copy."""
    return None if mask is None else mask.view(torch.uint8)


def _strides(mask: Tensor | None, dimensions: int) -> tuple[int, ...]:
    return (0,) * dimensions if mask is None else mask.stride()
