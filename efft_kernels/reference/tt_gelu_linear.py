"""y = gelu(z) Wᵀ + b + (gelu(z) D) G, and its gradients, as the formulas stand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from efft_kernels._autocast import no_autocast
from efft_kernels.reference._precision import wide
from efft_kernels.reference.tt_linear import tt_linear, tt_linear_bwd


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


def tt_gelu_linear_bwd(
    gy: Tensor,  # [tokens, d_out]
    z: Tensor,  # [tokens, d_in]
    W: Tensor | None,  # [d_out, d_in]; for dz
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    approximate: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # dz, dD, dG in the dtypes of z, D, G
    """The gradients, themselves differentiable; no dz without W."""
    wide_z = z.to(wide(z, D, G))
    a = F.gelu(wide_z, approximate=approximate)
    da, dD, dG = tt_linear_bwd(gy.to(a.dtype), a, W, a @ D.to(a.dtype), D, G)
    if da is None:
        return None, dD, dG
    return torch.ops.aten.gelu_backward(da, wide_z, approximate=approximate).to(z.dtype), dD, dG
