"""tt_linear on a = gelu(z); backward makes a again, which costs one pass over z, instead of keeping it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from efft_kernels.backends import Backend
from efft_kernels.eager.tt_linear import linear_bwd, linear_fwd
from efft_kernels.ops._schemas import implement


def _tt_gelu_linear_fwd(
    z: Tensor,  # [tokens, d_in]
    W: Tensor,  # [d_out, d_in]
    b: Tensor | None,  # [d_out]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    approximate: str,
) -> tuple[Tensor, Tensor]:  # y [tokens, d_out], h [tokens, r1]
    return linear_fwd(_gelu(z, approximate, W.dtype), W, b, D, G)


def _tt_gelu_linear_bwd(
    gy: Tensor,  # [tokens, d_out]
    z: Tensor,  # [tokens, d_in]
    W: Tensor | None,  # [d_out, d_in]
    h: Tensor | None,  # [tokens, r1]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    approximate: str,
    need_dz: bool,
    need_dD: bool,
    need_dG: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    a = _gelu(z, approximate, gy.dtype) if need_dD else None
    da, dD, dG = linear_bwd(gy, a, W, h, D, G, need_dz, need_dD, need_dG)
    if not need_dz:
        return z.new_empty(0), dD, dG
    if da.dtype == z.dtype:
        return torch.ops.aten.gelu_backward(da, z, approximate=approximate), dD, dG
    wide = torch.promote_types(z.dtype, da.dtype)
    return torch.ops.aten.gelu_backward(da.to(wide), z.to(wide), approximate=approximate).to(z.dtype), dD, dG


def _gelu(z: Tensor, approximate: str, dtype: torch.dtype) -> Tensor:
    """The GELU, rounded once, to ``dtype``."""
    if z.dtype != dtype:
        z = z.to(torch.promote_types(z.dtype, dtype))
    return F.gelu(z, approximate=approximate).to(dtype)


implement("tt_gelu_linear_fwd", Backend.EAGER, _tt_gelu_linear_fwd)
implement("tt_gelu_linear_bwd", Backend.EAGER, _tt_gelu_linear_bwd)
