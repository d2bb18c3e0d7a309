"""y = x Wᵀ + b + (x D) G, as the formula stands."""

from __future__ import annotations

from torch import Tensor

from efft_kernels._autocast import no_autocast
from efft_kernels.reference._precision import wide


def tt_linear(
    x: Tensor,  # [..., d_in]
    W: Tensor,  # [d_out, d_in]
    b: Tensor | None,  # [d_out]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
) -> Tensor:  # [..., d_out], dtype of x
    dtype = wide(x, D, G)
    with no_autocast(x.device):
        xw = x.to(dtype)
        y = xw @ W.to(dtype).t() + (xw @ D.to(dtype)) @ G.to(dtype)
        if b is not None:
            y = y + b.to(dtype)
        return y.to(x.dtype)
