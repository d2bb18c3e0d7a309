"""y[i] = x[i] Wᵀ + b + (x[i] D[a_i]) G[a_i], sample by sample, and its gradients; a negative a_i stands for no
adapter."""

from __future__ import annotations

import torch
from torch import Tensor

from efft_kernels.reference._precision import wide
from efft_kernels.reference.tt_linear import tt_linear


def tt_linear_grouped(
    x: Tensor,  # [samples, tokens, d_in]
    W: Tensor,  # [d_out, d_in]
    b: Tensor | None,  # [d_out]
    D: Tensor,  # [n_adapters, d_in, r1]
    G: Tensor,  # [n_adapters, r1, d_out]
    adapter: Tensor,  # [samples]
) -> Tensor:  # [samples, tokens, d_out], dtype of x
    none = (D.new_zeros(D.shape[1:]), G.new_zeros(G.shape[1:]))
    factors = [(D[i], G[i]) if i >= 0 else none for i in adapter.tolist()]
    y = [tt_linear(sample, W, b, *pair) for sample, pair in zip(x, factors, strict=True)]
    return torch.stack(y) if y else x.new_empty(*x.shape[:2], W.shape[0])


def tt_linear_grouped_bwd(
    gy: Tensor,  # [samples, tokens, d_out]
    x: Tensor | None,  # [samples, tokens, d_in]; for dD and dG
    W: Tensor | None,  # [d_out, d_in]; for dx
    D: Tensor,  # [n_adapters, d_in, r1]
    G: Tensor,  # [n_adapters, r1, d_out]
    adapter: Tensor,  # [samples]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # dx, dD, dG in the dtypes of gy, D, G
    """The gradients, themselves differentiable; None where what one is made from is None. NaN for an adapter that does
    not exist."""
    dtype = wide(gy, D, G)
    index = adapter.clamp(0, D.shape[0] - 1)

    def of_samples(factors: Tensor) -> Tensor:  # not by a product with a mask: what nobody uses may be NaN
        rows = factors[index].to(dtype)
        rows = rows.masked_fill((adapter < 0)[:, None, None], 0)
        return rows.masked_fill((adapter >= len(factors))[:, None, None], torch.nan)

    def of_adapters(rows: Tensor, like: Tensor) -> Tensor:
        return like.new_zeros(like.shape, dtype=dtype).index_add(0, index, rows).to(like.dtype)

    down, up, wide_gy = of_samples(D), of_samples(G), gy.to(dtype)
    dh = wide_gy @ up.mT  # [samples, tokens, r1]; zero for a sample without adapter, as h is
    dx = None if W is None else (wide_gy @ W.to(dtype) + dh @ down.mT).to(gy.dtype)
    if x is None:
        return dx, None, None
    dD = of_adapters(x.to(dtype).mT @ dh, D)
    dG = of_adapters((x.to(dtype) @ down).mT @ wide_gy, G)
    return dx, dD, dG
