"""W ← W + sign · (D G)ᵀ in fp32 (fp64 for an fp64 W), rounded once to W's dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from efft_kernels.backends import Backend
from efft_kernels.ops._schemas import implement


def _tt_merge_(W: Tensor, D: Tensor, G: Tensor, sign: float) -> None:
    # W [d_out, d_in], D [d_in, r1], G [r1, d_out]
    dtype = torch.promote_types(W.dtype, torch.float32)
    Gt, Dt = G.to(dtype).t(), D.to(dtype).t()
    if W.dtype == dtype:
        W.addmm_(Gt, Dt, alpha=sign)
    else:
        W.copy_(torch.addmm(W.to(dtype), Gt, Dt, alpha=sign))


implement("tt_merge_", Backend.EAGER, _tt_merge_)
