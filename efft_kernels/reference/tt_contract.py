"""G[l] = scale · [C[l, 0] V | C[l, 1] V | ...], with dropped elements of C and V set to zero, and its gradients."""

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
        cores, right = _kept(C.to(dtype), V.to(dtype), keep_C, keep_V)
        G = scale * torch.einsum("lnab,lbd->land", cores, right)
        return G.flatten(2).to(C.dtype)


def tt_contract_bwd(
    dG: Tensor,  # [n_layers, r1, n_cores * d_out]
    C: Tensor,  # [n_layers, n_cores, r1, r2]
    V: Tensor,  # [r2, d_out]
    keep_C: Tensor | None,  # [n_layers, n_cores, r1, r2], bool
    keep_V: Tensor | None,  # [n_layers, r2, d_out], bool
    scale: float,
) -> tuple[Tensor, Tensor]:  # dC, dV in the dtypes of C, V
    """The gradients, themselves differentiable."""
    dtype = wide(C, V)
    cores, right = _kept(C.to(dtype), V.to(dtype), keep_C, keep_V)
    blocks = scale * dG.to(dtype).unflatten(2, (C.shape[1], V.shape[1]))  # [n_layers, r1, n_cores, d_out]
    dC = torch.einsum("land,lbd->lnab", blocks, right)
    dV = torch.einsum("lnab,land->lbd", cores, blocks)
    dC, dV = _masked(dC, keep_C), _masked(dV, keep_V).sum(0)
    return dC.to(C.dtype), dV.to(V.dtype)


def _kept(C: Tensor, V: Tensor, keep_C: Tensor | None, keep_V: Tensor | None) -> tuple[Tensor, Tensor]:
    """C, and V of every layer, with dropped elements zero."""
    return _masked(C, keep_C), _masked(V.expand(C.shape[0], *V.shape), keep_V)


def _masked(tensor: Tensor, keep: Tensor | None) -> Tensor:
    return tensor if keep is None else tensor * keep
