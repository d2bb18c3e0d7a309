"""y = x Wᵀ + b + (x D) G, and its gradients, as the formulas stand."""

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


def tt_linear_bwd(
    gy: Tensor,  # [tokens, d_out]
    x: Tensor | None,  # [tokens, d_in]; for dD
    W: Tensor | None,  # [d_out, d_in]; for dx
    h: Tensor | None,  # [tokens, r1]; for dG
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    gh: Tensor | None = None,  # [tokens, r1]: what reaches h by another way than y
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # dx, dD, dG in the dtypes of gy, D, G
    """The gradients, themselves differentiable; None where what one is made from is None."""
    dtype = wide(gy, D, G)
    wide_gy, wide_D = gy.to(dtype), D.to(dtype)
    dh = wide_gy @ G.to(dtype).t()  # [tokens, r1]
    if gh is not None:
        dh = dh + gh
    dx = None if W is None else (wide_gy @ W.to(dtype) + dh @ wide_D.t()).to(gy.dtype)
    dD = None if x is None else (x.to(dtype).t() @ dh).to(D.dtype)
    dG = None if h is None else (h.to(dtype).t() @ wide_gy).to(G.dtype)
    return dx, dD, dG
