"""y = n Wᵀ + b + (n D) G with n = (x - mean(x)) / sqrt(var(x) + eps) · gamma + beta, as the formula stands."""

from __future__ import annotations

from torch import Tensor

from efft_kernels._autocast import no_autocast
from efft_kernels.reference._precision import wide
from efft_kernels.reference.tt_linear import tt_linear


def tt_norm_linear(
    x: Tensor,  # [..., d_in]
    gamma: Tensor | None,  # [d_in]
    beta: Tensor | None,  # [d_in]
    W: Tensor,  # [d_out, d_in]
    b: Tensor | None,  # [d_out]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    eps: float,
) -> Tensor:  # [..., d_out], dtype of W
    with no_autocast(x.device):
        n = x.to(wide(x))
        n = n - n.mean(-1, keepdim=True)
        n = n / (n.square().mean(-1, keepdim=True) + eps).sqrt()
        if gamma is not None:
            n = n * gamma
        if beta is not None:
            n = n + beta
        return tt_linear(n, W, b, D, G).to(W.dtype)
