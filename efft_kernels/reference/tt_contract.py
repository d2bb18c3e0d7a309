"""G[l] = scale · [C[l, 0] V | C[l, 1] V | ...], with dropped elements of C and V set to zero."""

from __future__ import annotations

import torch
from torch import Tensor

from efft_kernels._autocast import no_autocast
from efft_kernels.reference._precision import wide


def tt_contract(
    C: Tensor,  # [n_layers, n_cores, r1, r2]
    V: Tensor,  # [r2, d_out]
    keep_C: Tensor | None = None,  # [n_layers, n_cores, r1, r2], bool
    keep_V: Tensor | None = None,  # [n_layers, r2, d_out], bool
    scale: float = 1.0,
) -> Tensor:  # [n_layers, r1, n_cores * d_out], dtype of C
    dtype = wide(C, V)
    with no_autocast(C.device):
        cores = C.to(dtype) if keep_C is None else C.to(dtype) * keep_C
        right = V.to(dtype).expand(C.shape[0], *V.shape)
        if keep_V is not None:
            right = right * keep_V
        G = scale * torch.einsum("lnab,lbd->land", cores, right)
        return G.flatten(2).to(C.dtype)
