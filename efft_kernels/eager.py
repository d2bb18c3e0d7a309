"""Implement the forward and backward passes of each op with the matrix products of the vendor's library.

These functions run on any device and need no compiler. The *vendor's library* is the one that torch calls, such as
cuBLAS or oneDNN. W and b are the frozen weight and the bias of a linear layer, and the update of the layer is D G, the
product of two factors. ``tt_linear`` computes h = x D in the forward pass and dh = gy Gᵀ in the backward pass, where gy
is the gradient of the output. The products h G and dh Dᵀ are added in place to the products with W. Therefore neither
pass has a temporary tensor of the size of W. Factors are cast to the dtype of the activations, and never the other way
round. Other backends use some of these functions for parts of their ops.

In the names of gradients, d stands for "gradient of". The arguments ``need_...`` of a backward function state which
gradients are needed. All other gradients are returned with 0 elements.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from efft_kernels._arguments import in_dtype, rows_of, transposed, unflatten_tokens
from efft_kernels._mlp import Layers, mlp_backward, mlp_forward


def tt_linear_fwd(
    x: Tensor,  # [..., d_in]
    W: Tensor,  # [d_out, d_in]
    b: Tensor | None,  # [d_out]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
) -> tuple[Tensor, Tensor]:  # y [..., d_out], h [tokens, r1]
    """Compute y = x Wᵀ + b + h G with h = x D."""
    dtype, rows, Wt = x.dtype, rows_of(x), transposed(W)
    h = torch.mm(rows, in_dtype(D, dtype))
    y = torch.mm(rows, Wt) if b is None else torch.addmm(in_dtype(b, dtype), rows, Wt)
    return unflatten_tokens(y.addmm_(h, in_dtype(G, dtype)), x.shape[:-1]), h


def tt_linear_bwd(
    gy: Tensor,  # [..., d_out]
    x: Tensor | None,  # [..., d_in]
    W: Tensor | None,  # [d_out, d_in]
    h: Tensor | None,  # [tokens, r1]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    need_dx: bool,
    need_dD: bool,
    need_dG: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute dh = gy Gᵀ, dx = gy W + dh Dᵀ, dD = xᵀ dh, dG = hᵀ gy, and db, the sum of gy over the tokens.

    dD, dG and db are in fp32, or in fp64 if D, G or gy is in fp64.
    """
    dx = dD = dG = db = None
    leading, gy, dtype = gy.shape[:-1], rows_of(gy), gy.dtype
    of_D, of_G, of_b = _wide(D.dtype), _wide(G.dtype), _wide(dtype)
    if need_dx or need_dD:
        dh = torch.mm(gy, transposed(in_dtype(G, dtype)))  # [tokens, r1]
        if need_dx:
            assert W is not None
            dx = unflatten_tokens(torch.mm(gy, W).addmm_(dh, transposed(in_dtype(D, dtype))), leading)
        if need_dD:
            assert x is not None
            dD = _reduce_tokens(rows_of(x), dh, of_D)
    if need_dG:
        assert h is not None
        if need_db and gy.device.type == "cpu":  # a separate sum takes several times as long in bfloat16 on the CPU
            both = torch.cat([h, h.new_ones(h.shape[0], 1)], 1).t() @ gy  # [r1 + 1, d_out]
            dG, db = both[:-1].to(of_G), both[-1].to(of_b, copy=True)
        else:
            dG = _reduce_tokens(h, gy, of_G)
    if need_db and db is None:
        db = gy.sum(0, dtype=of_b)
    if dx is None:
        dx = _empty(dtype, gy)
    if dD is None:
        dD = _empty(of_D, gy)
    if dG is None:
        dG = _empty(of_G, gy)
    if db is None:
        db = _empty(of_b, gy)
    return dx, dD, dG, db


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _empty(dtype: torch.dtype, like: Tensor) -> Tensor:
    """Return a tensor with 0 elements on the device of ``like``."""
    return torch.empty(0, dtype=dtype, device=like.device)


def _reduce_tokens(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return aᵀ b in ``dtype``, without first rounding to the dtype of ``a`` if the vendor's product can write fp32."""
    if a.is_cuda and a.dtype != dtype == torch.float32:
        return torch.mm(transposed(a), b, out_dtype=dtype)
    return in_dtype(torch.mm(transposed(a), b), dtype)


def tt_gelu_linear_fwd(
    z: Tensor,  # [tokens, d_in]
    W: Tensor,  # [d_out, d_in]
    b: Tensor | None,  # [d_out]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    approximate: str,
) -> tuple[Tensor, Tensor]:  # y [tokens, d_out], h [tokens, r1]
    """Compute tt_linear on a = gelu(z)."""
    return tt_linear_fwd(_gelu(z, approximate, W.dtype), W, b, D, G)


def tt_gelu_linear_bwd(
    gy: Tensor,  # [tokens, d_out]
    z: Tensor,  # [tokens, d_in]
    W: Tensor | None,  # [d_out, d_in]
    h: Tensor | None,  # [tokens, r1]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    approximate: str,
    need_dz: bool,
    need_dD: bool,
    need_dG: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute dz, dD, dG and db. The output of the GELU was not saved, so it is computed from z again."""
    a = _gelu(z, approximate, gy.dtype) if need_dD else None
    da, dD, dG, db = tt_linear_bwd(gy, a, W, h, D, G, need_dz, need_dD, need_dG, need_db)
    if not need_dz:
        return z.new_empty(0), dD, dG, db
    if da.dtype == z.dtype:
        return torch.ops.aten.gelu_backward(da, z, approximate=approximate), dD, dG, db
    wide = torch.promote_types(z.dtype, da.dtype)
    return torch.ops.aten.gelu_backward(da.to(wide), z.to(wide), approximate=approximate).to(z.dtype), dD, dG, db


def _gelu(z: Tensor, approximate: str, dtype: torch.dtype) -> Tensor:
    """Return the GELU, rounded once to ``dtype``."""
    if z.dtype != dtype:
        z = z.to(torch.promote_types(z.dtype, dtype))
    return F.gelu(z, approximate=approximate).to(dtype)


def tt_norm_linear_fwd(
    x: Tensor,  # [tokens, d_in]
    gamma: Tensor | None,  # [d_in]
    beta: Tensor | None,  # [d_in]
    eps: float,
    W: Tensor,  # [d_out, d_in]
    b: Tensor | None,  # [d_out]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # y [tokens, d_out], h [tokens, r1], mean and rstd [tokens]
    """Compute tt_linear on the layer norm of x. rstd is 1 / sqrt(variance + eps)."""
    n, mean, rstd = _layer_norm(x, gamma, beta, eps, W.dtype)
    y, h = tt_linear_fwd(n.to(W.dtype), W, b, D, G)
    wide = torch.promote_types(x.dtype, torch.float32)
    return y, h, mean.to(wide).flatten(), rstd.to(wide).flatten()


def tt_norm_linear_bwd(
    gy: Tensor,  # [tokens, d_out]
    x: Tensor,  # [tokens, d_in]
    gamma: Tensor | None,  # [d_in]
    beta: Tensor | None,  # [d_in]
    eps: float,
    mean: Tensor,  # [tokens]
    rstd: Tensor,  # [tokens]
    W: Tensor | None,  # [d_out, d_in]
    h: Tensor | None,  # [tokens, r1]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    need_dx: bool,
    need_dD: bool,
    need_dG: bool,
    need_db: bool,
    need_dgamma: bool,
    need_dbeta: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute dx, dD, dG, db, dgamma and dbeta. The norm's output was not saved, so it is computed from x again."""
    n = _layer_norm(x, gamma, beta, eps, gy.dtype)[0].to(gy.dtype) if need_dD else None
    needs = need_dx, need_dgamma, need_dbeta
    dn, dD, dG, db = tt_linear_bwd(gy, n, W, h, D, G, any(needs), need_dD, need_dG, need_db)
    dx, dgamma, dbeta = layer_norm_bwd(dn, x, gamma, beta, mean, rstd, *needs)
    return dx, dD, dG, db, dgamma, dbeta


def layer_norm_bwd(
    dn: Tensor,  # [tokens, d_in]
    x: Tensor,  # [tokens, d_in]
    gamma: Tensor | None,  # [d_in]
    beta: Tensor | None,  # [d_in]
    mean: Tensor,  # [tokens]
    rstd: Tensor,  # [tokens]
    need_dx: bool,
    need_dgamma: bool,
    need_dbeta: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # dx [tokens, d_in], dgamma and dbeta [d_in]
    """Compute the gradients of a layer norm with torch's kernel, from dn, the gradient of the norm's output.

    The kernel needs one dtype for all inputs except the statistics, so the inputs are cast. Each gradient is cast back
    to the dtype of its tensor. A gradient that is not needed has 0 elements. If no gradient is needed, nothing is read.
    """
    likes = [x if like is None else like for like in (x, gamma, beta)]
    needs = [need_dx, need_dgamma, need_dbeta]
    grads: Sequence[Tensor | None] = [None] * 3
    if any(needs):
        wide, gamma, beta = _alike(x, gamma, beta, dn.dtype)
        if x.device.type == "cpu":
            mean, rstd = mean.to(wide.dtype), rstd.to(wide.dtype)
        statistics = (mean[:, None], rstd[:, None])
        grads = torch.ops.aten.native_layer_norm_backward(
            dn.to(wide.dtype), wide, x.shape[1:], *statistics, gamma, beta, needs
        )
    dx, dgamma, dbeta = (
        like.new_empty(0) if grad is None or not need else grad.to(like.dtype)
        for grad, like, need in zip(grads, likes, needs, strict=True)
    )
    return dx, dgamma, dbeta


def _layer_norm(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the norm's output, which the caller still has to round to ``dtype``, and the norm's mean and rstd."""
    wide, gamma, beta = _alike(x, gamma, beta, dtype)
    return torch.native_layer_norm(wide, x.shape[1:], gamma, beta, eps)


def _alike(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Cast all inputs to one dtype, as torch's kernel requires: the widest of their dtypes and ``dtype``."""
    others = {dtype, *(parameter.dtype for parameter in (gamma, beta) if parameter is not None)}
    if others == {x.dtype}:
        return x, gamma, beta
    dtype = functools.reduce(torch.promote_types, others, x.dtype)
    gamma, beta = (None if parameter is None else parameter.to(dtype) for parameter in (gamma, beta))
    return x.to(dtype), gamma, beta


_LAYERS = Layers(
    tt_linear_fwd, tt_linear_bwd, tt_norm_linear_fwd, tt_norm_linear_bwd, tt_gelu_linear_fwd, tt_gelu_linear_bwd
)


def tt_mlp_fwd(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return mlp_forward(_LAYERS, x, *rest)


def tt_mlp_bwd(gy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return mlp_backward(_LAYERS, gy, *rest)


def tt_linear_grouped(*operands: Tensor | None) -> Tensor:
    return tt_linear_grouped_fwd(*operands)[0]  # type: ignore[arg-type]  # the schema of the op checks them


def tt_linear_grouped_fwd(
    x: Tensor,  # [samples, tokens, d_in]
    W: Tensor,  # [d_out, d_in]
    b: Tensor | None,  # [d_out]
    D: Tensor,  # [n_adapters, d_in, r1]
    G: Tensor,  # [n_adapters, r1, d_out]
    adapter: Tensor,  # [samples], negative for no adapter
) -> tuple[Tensor, Tensor]:  # y [samples, tokens, d_out], h [samples, tokens, r1]
    """Compute y[i] = x[i] Wᵀ + b + h[i] G[a_i] with h[i] = x[i] D[a_i], where a_i = adapter[i].

    The factors of the samples' adapters are gathered, and batched products multiply by them.
    """
    y = F.linear(x, W, None if b is None else b.to(x.dtype))
    if x.numel() == 0 or D.shape[0] == 0:
        return y, x.new_zeros(*x.shape[:2], D.shape[2])
    h = _by_sample(x, D, adapter)
    return y.baddbmm_(h, _of_samples(G, adapter).to(x.dtype)), h


def tt_linear_grouped_bwd(gy: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return grouped_backward(tt_linear_grouped_fwd, gy, *rest)


def grouped_backward(
    forward: Callable[..., tuple[Tensor, Tensor]],
    gy: Tensor,  # [samples, tokens, d_out]
    x: Tensor | None,  # [samples, tokens, d_in]
    W: Tensor | None,  # [d_out, d_in]
    h: Tensor | None,  # [samples, tokens, r1]
    D: Tensor,  # [n_adapters, d_in, r1]
    G: Tensor,  # [n_adapters, r1, d_out]
    adapter: Tensor,  # [samples], negative for no adapter
    need_dx: bool,
    need_dD: bool,
    need_dG: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the backward pass of tt_linear_grouped with the ``forward`` function of a backend and batched products.

    dx = gy W + dh Dᵀ and dh = gy Gᵀ have the form of the forward pass with other operands, so ``forward`` computes
    them. Batched products compute dD and dG of each adapter, which are sums over the tokens of its samples. db is the
    sum of gy over the samples and tokens of each adapter.
    """
    dx, dh = gy.new_empty(0), None
    if need_dx:
        assert W is not None
        dx, dh = forward(gy, W.t(), None, G.mT, D.mT, adapter)
    elif need_dD:
        dh = _by_sample(gy, G.mT, adapter)
    dD, dG, db = D.new_empty(0), G.new_empty(0), gy.new_empty(0, dtype=torch.promote_types(gy.dtype, torch.float32))
    if need_dD:
        assert x is not None
        assert dh is not None
        dD = _sum_by_adapter(_reduce_each(x, dh, D.dtype), adapter, len(D)).to(D.dtype)
    if need_dG:
        assert h is not None
        dG = _sum_by_adapter(_reduce_each(h, gy, G.dtype), adapter, len(G)).to(G.dtype)
    if need_db:
        db = _sum_by_adapter(gy.sum(1, dtype=db.dtype), adapter, len(G))
    return dx, dD, dG, db


def add_biases(y: Tensor, b: Tensor, adapter: Tensor) -> Tensor:
    """Add row ``adapter[i]`` of the biases ``b`` [n_adapters, d_out] to sample i of y, in place."""
    return y if y.numel() == 0 else y.add_(_of_samples(b, adapter)[:, None])


def _of_samples(rows: Tensor, adapter: Tensor) -> Tensor:
    """Return the entry of ``rows`` for each sample's adapter: zeros without an adapter, NaN for a missing adapter."""
    found = rows[adapter.clamp(0, len(rows) - 1)]
    shape = (-1, *[1] * (rows.dim() - 1))
    # A product with a mask would be wrong: the entry found for a sample without an adapter may contain NaN.
    found.masked_fill_((adapter < 0).view(shape), 0)
    return found.masked_fill_((adapter >= len(rows)).view(shape), torch.nan)


def _by_sample(x: Tensor, factors: Tensor, adapter: Tensor) -> Tensor:
    """Return each sample's product with its adapter's factor, [samples, tokens, columns]."""
    h = torch.bmm(x, factors[adapter.clamp(0, len(factors) - 1)].to(x.dtype))
    h.masked_fill_((adapter < 0)[:, None, None], 0)
    return h.masked_fill_((adapter >= len(factors))[:, None, None], torch.nan)


def _reduce_each(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return aᵀ b for each sample, like :func:`_reduce_tokens`."""
    if a.is_cuda and a.dtype != dtype == torch.float32:
        return torch.bmm(a.mT, b, out_dtype=dtype)
    return a.mT @ b


def _sum_by_adapter(parts: Tensor, adapter: Tensor, n_adapters: int) -> Tensor:
    """Return the sum of the parts [samples, ...] of each adapter, [n_adapters, ...] in fp32 (fp64 for fp64).

    Samples without an adapter are added to an additional row, which is then cut off. Multiplying their parts by zero
    instead would turn infinite parts into NaN.
    """
    row = adapter.masked_fill((adapter < 0) | (adapter >= n_adapters), n_adapters)
    total = parts.new_zeros(n_adapters + 1, *parts.shape[1:], dtype=torch.promote_types(parts.dtype, torch.float32))
    parts = parts.to(total.dtype)
    # On GPUs, index_add_ adds in a random order, and index_put_ in a fixed one.
    total = total.index_put_((row,), parts, accumulate=True) if parts.is_cuda else total.index_add_(0, row, parts)
    return total[:n_adapters]


def _rows(C: Tensor, keep_C: Tensor | None, scale: float) -> Tensor:
    """Return scale · C as [n_layers, r1 * n_cores, r2], with the elements that ``keep_C`` drops set to zero."""
    C = C * scale if keep_C is None else C * keep_C * scale
    return C.transpose(1, 2).flatten(1, 2)


def tt_contract_fwd(
    C: Tensor,  # [n_layers, n_cores, r1, r2]
    V: Tensor,  # [r2, d_out]
    keep_C: Tensor | None,  # [n_layers, n_cores, r1, r2], bool
    keep_V: Tensor | None,  # [n_layers, r2, d_out], bool
    scale: float,
) -> Tensor:  # [n_layers, r1, n_cores * d_out]
    """Compute G[l] = scale · [C[l, 0] V | C[l, 1] V | ...] as one matrix product for all layers and cores.

    The dropout masks ``keep_C`` and ``keep_V`` are False for elements of C and V that are set to zero. Cores are
    arranged as [n_layers, r1, n_cores, r2], so that the product has the layout of G and G[l] needs no copy. With a mask
    on V, every layer has its own right factor, and the product is batched over layers.
    """
    n_layers, n_cores, r1, _ = C.shape
    G = _rows(C, keep_C, scale) @ (V if keep_V is None else V * keep_V)
    return G.reshape(n_layers, r1, n_cores * V.shape[1])


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
    n_layers, n_cores, r1, r2 = C.shape
    dG = dG.reshape(n_layers, r1 * n_cores, V.shape[1])
    dC, dV = C.new_empty(0), V.new_empty(0)
    if need_dC:
        right = V if keep_V is None else V * keep_V
        dC = (dG @ right.transpose(-1, -2)).reshape(n_layers, r1, n_cores, r2).transpose(1, 2) * scale
        dC = dC.contiguous() if keep_C is None else (dC * keep_C).contiguous()
    if need_dV:
        rows = _rows(C, keep_C, scale)
        if keep_V is None:
            dV = rows.flatten(0, 1).t() @ dG.flatten(0, 1)
        else:
            dV = (torch.bmm(rows.transpose(1, 2), dG) * keep_V).sum(0)
    return dC, dV


def tt_merge_(
    W: Tensor,  # [d_out, d_in], changed in place
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    sign: float,
) -> None:
    """Compute W ← W + sign · (D G)ᵀ in fp32 (fp64 for an fp64 W), rounded once to W's dtype."""
    dtype = torch.promote_types(W.dtype, torch.float32)
    Gt, Dt = G.to(dtype).t(), D.to(dtype).t()
    if W.dtype == dtype:
        W.addmm_(Gt, Dt, alpha=sign)
    else:
        W.copy_(torch.addmm(W.to(dtype), Gt, Dt, alpha=sign))
