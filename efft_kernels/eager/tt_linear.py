"""y = x Wᵀ + b + h G with h = x D; backward dh = gy Gᵀ, dx = gy W + dh Dᵀ, dD = xᵀ dh, dG = hᵀ gy.

One h is kept and one dh made; both rank-r products accumulate into the buffer that the frozen product wrote, so neither
direction has a temporary of size d_in x d_out. Factors are cast to the activations' dtype, activations never.
"""

from __future__ import annotations

import torch
from torch import Tensor

from efft_kernels.backends import Backend
from efft_kernels.ops._schemas import implement


def linear_fwd(
    x: Tensor,  # [tokens, d_in]
    W: Tensor,  # [d_out, d_in]
    b: Tensor | None,  # [d_out]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
) -> tuple[Tensor, Tensor]:  # y [tokens, d_out], h [tokens, r1]
    h = x @ D.to(x.dtype)
    y = x @ W.t() if b is None else torch.addmm(b, x, W.t())
    return y.addmm_(h, G.to(x.dtype)), h


def linear_bwd(
    gy: Tensor,  # [tokens, d_out]
    x: Tensor | None,  # [tokens, d_in]
    W: Tensor | None,  # [d_out, d_in]
    h: Tensor | None,  # [tokens, r1]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    need_dx: bool,
    need_dD: bool,
    need_dG: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = dD = dG = None
    if need_dx or need_dD:
        dh = gy @ G.to(gy.dtype).t()  # [tokens, r1]
        if need_dx:
            assert W is not None
            dx = (gy @ W).addmm_(dh, D.to(gy.dtype).t())
        if need_dD:
            assert x is not None
            dD = _reduce_tokens(x, dh, D.dtype)
    if need_dG:
        assert h is not None
        dG = _reduce_tokens(h, gy, G.dtype)
    dx, dD, dG = (like.new_empty(0) if t is None else t for t, like in ((dx, gy), (dD, D), (dG, G)))
    return dx, dD, dG


def _reduce_tokens(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """aᵀ b in ``dtype``; kept unrounded in fp32 where the vendor's product can write it."""
    if a.is_cuda and a.dtype != dtype == torch.float32:
        return torch.mm(a.t(), b, out_dtype=dtype)
    return (a.t() @ b).to(dtype)


implement("tt_linear_fwd", Backend.EAGER, linear_fwd)
implement("tt_linear_bwd", Backend.EAGER, linear_bwd)
