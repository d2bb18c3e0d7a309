"""G[l] = scale · [C[l, 0] V | C[l, 1] V | ...] as one matrix product for all layers and cores.

Cores are laid out [n_layers, r1, n_cores, r2], so the product comes out as G's own layout and G[l] needs no copy.
With a mask on V every layer has its own right factor and the product is batched over layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from efft_kernels.backends import Backend
from efft_kernels.ops._schemas import implement


def _rows(C: Tensor, keep_C: Tensor | None, scale: float) -> Tensor:
    """scale · C, masked, as [n_layers, r1 * n_cores, r2]."""
    C = C * scale if keep_C is None else C * keep_C * scale
    return C.transpose(1, 2).flatten(1, 2)


def _tt_contract_fwd(
    C: Tensor,  # [n_layers, n_cores, r1, r2]
    V: Tensor,  # [r2, d_out]
    keep_C: Tensor | None,  # [n_layers, n_cores, r1, r2], bool
    keep_V: Tensor | None,  # [n_layers, r2, d_out], bool
    scale: float,
) -> Tensor:  # [n_layers, r1, n_cores * d_out]
    n_layers, n_cores, r1, _ = C.shape
    G = _rows(C, keep_C, scale) @ (V if keep_V is None else V * keep_V)
    return G.reshape(n_layers, r1, n_cores * V.shape[1])


def _tt_contract_bwd(
    dG: Tensor,  # [n_layers, r1, n_cores * d_out]
    C: Tensor,
    V: Tensor,
    keep_C: Tensor | None,
    keep_V: Tensor | None,
    scale: float,
    need_dC: bool,
    need_dV: bool,
) -> tuple[Tensor, Tensor]:
    n_layers, n_cores, r1, r2 = C.shape
    dG = dG.reshape(n_layers, r1 * n_cores, V.shape[1])
    dC, dV = C.new_empty(0), V.new_empty(0)
    if need_dC:
        right = V if keep_V is None else V * keep_V
        dC = (dG @ right.transpose(-1, -2)).reshape(n_layers, r1, n_cores, r2).transpose(1, 2) * scale
        dC = dC.contiguous() if keep_C is None else (dC * keep_C).contiguous()
    if need_dV:
        rows = _rows(C, keep_C, scale)
        if keep_V is None:
            dV = rows.flatten(0, 1).t() @ dG.flatten(0, 1)
        else:
            dV = (torch.bmm(rows.transpose(1, 2), dG) * keep_V).sum(0)
    return dC, dV


implement("tt_contract_fwd", Backend.EAGER, _tt_contract_fwd)
implement("tt_contract_bwd", Backend.EAGER, _tt_contract_bwd)
