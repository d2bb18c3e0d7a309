"""y[i] = x[i] Wᵀ + b + (x[i] D[a_i]) G[a_i], with the samples' factors gathered into batched products."""

from __future__ import annotations

import torch
from torch import Tensor

from efft_kernels.backends import Backend
from efft_kernels.ops._schemas import implement


def _tt_linear_grouped(
    x: Tensor,  # [samples, tokens, d_in]
    W: Tensor,  # [d_out, d_in]
    b: Tensor | None,  # [d_out]
    D: Tensor,  # [n_adapters, d_in, r1]
    G: Tensor,  # [n_adapters, r1, d_out]
    adapter: Tensor,  # [samples], negative: none
) -> Tensor:  # [samples, tokens, d_out]
    y = torch.nn.functional.linear(x, W, b)
    if x.numel() == 0 or D.shape[0] == 0:
        return y
    used = adapter.clamp(0, D.shape[0] - 1)
    none, missing = (adapter < 0)[:, None, None], (adapter >= D.shape[0])[:, None, None]
    h = torch.bmm(x, D[used].to(x.dtype))  # [samples, tokens, r1]
    h.masked_fill_(none, 0).masked_fill_(missing, torch.nan)
    return y.baddbmm_(h, G[used].masked_fill_(none, 0).to(x.dtype))


implement("tt_linear_grouped", Backend.EAGER, _tt_linear_grouped)
