"""y[i] = x[i] Wᵀ + b + (x[i] D[a_i]) G[a_i], sample by sample; a negative a_i stands for no adapter."""

from __future__ import annotations

import torch
from torch import Tensor

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
