"""y = gelu(z) Wᵀ + b + (gelu(z) D) G, as the formula stands."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from efft_kernels._autocast import no_autocast
from efft_kernels.reference._precision import wide
from efft_kernels.reference.tt_linear import tt_linear


def tt_gelu_linear(
    z: Tensor,  # [..., d_in]
    W: Tensor,  # [d_out, d_in]
    b: Tensor | None,  # [d_out]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    approximate: str,
) -> Tensor:  # [..., d_out], dtype of W
    with no_autocast(z.device):
        return tt_linear(F.gelu(z.to(wide(z)), approximate=approximate), W, b, D, G).to(W.dtype)
