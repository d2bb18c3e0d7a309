"""W ← W + sign · (D G)ᵀ, rounded once to W's dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from efft_kernels._autocast import no_autocast
from efft_kernels.reference._precision import wide


@torch.no_grad()
def tt_merge_(
    W: Tensor,  # [d_out, d_in], changed in place
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    sign: float = 1.0,
) -> Tensor:  # W
    dtype = wide(W, D, G)
    with no_autocast(W.device):
        return W.copy_(W.to(dtype) + sign * (D.to(dtype) @ G.to(dtype)).t())
