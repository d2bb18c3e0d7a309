"""Compute the operands D and G of every adapted layer of K runs from the factors of the runs.

The update of a linear layer adds ``x D G`` to its output for an input x. As in the library, D and G are computed in
fp32. A bank is a set of factors U, C and V that several layers share. A site is the place of a layer in its bank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from efft.methods.base import Blocks
from efft_kernels import Site
from efft_lab.studies.stacked.start import Start

#: Maps the name of each adapted layer to its operands D [K or 1, d_in, r] and G [K, r, d_out].
Operands = dict[str, tuple[Tensor, Tensor]]

Parameters = Mapping[str, Tensor]


def operands_of(p: Parameters, start: Start, scales: Parameters, keep: Tensor | None) -> Operands:
    """Return the operands of all adapted layers.

    Args:
        p: all parameters by name. Trained parameters are [K, ...].
        start: the start of one of the runs.
        scales: maps the name of each bank to the scales of its updates, [K].
        keep: for each run, the probability that an element of a factor is not dropped, [K]; None without dropout.
    """
    found: Operands = {}
    for bank, scale in scales.items():
        sites = {name: site for name, (owner, site) in start.sites.items() if owner == bank}
        if bank == "lora":
            found |= _of_lora(p, scale)
            continue
        U, C, V = (p[f"efft.{bank}.{factor}"] for factor in "UCV")
        if isinstance(next(iter(sites.values())), Site):
            found |= _of_train(U, C, V, scale, sites, keep)
        else:
            found |= _of_blocks(U, C, V, scale, sites)
    for name, (D, G) in found.items():
        if f"{name}.diagonal_in" in p:
            D = D * p[f"{name}.diagonal_in"][..., None]
        if f"{name}.diagonal_out" in p:
            G = G * p[f"{name}.diagonal_out"][:, None]
        found[name] = D, G
    for name in [name.removesuffix(".own_A") for name in p if name.endswith(".own_A")]:
        A, B = p[f"{name}.own_A"].mT, p[f"{name}.own_B"].mT
        if name in found:
            D, G = found[name]
            A, B = torch.cat([D.expand(len(A), -1, -1), A], 2), torch.cat([G, B], 1)
        found[name] = A, B
    return found


def _of_lora(p: Parameters, scale: Tensor) -> Operands:
    names = [name.removesuffix(".lora_A") for name in p if name.endswith(".lora_A")]
    return {name: (p[f"{name}.lora_A"].mT, p[f"{name}.lora_B"].mT * scale.view(-1, 1, 1)) for name in names}


def _of_train(
    U: Tensor,  # [K, d_in, r1]
    C: Tensor,  # [K, layers or 1, cores, r1, r2]
    V: Tensor,  # [K, r2, d_out]
    scale: Tensor,
    sites: Mapping[str, Site],
    keep: Tensor | None,
) -> Operands:
    layers = 1 + max(site.layer for site in sites.values())
    scopes = 1 + max(site.mask_scope for site in sites.values()) if keep is not None else 1
    C = (C * scale.view(-1, 1, 1, 1, 1)).expand(-1, layers, -1, -1, -1)
    if keep is None:  # one product for all layers
        right = _products(C, V[:, None])
        left = _products(C.mT, U.mT[:, None]) if any(site.transpose for site in sites.values()) else right
        ups = {(True, 0): left, (False, 0): right}
        U, V = U[:, None, None], V[:, None, None]  # [K, 1, 1, ...]
    else:
        U, V = (side[:, None, None].expand(-1, layers, scopes, -1, -1) for side in (U, V))
        U, C, V = (_dropped(factor, keep) for factor in (U, C, V))
        ups = {}
        for scope in range(scopes):
            ups[True, scope] = C.mT @ U.mT[:, :, scope, None]
            ups[False, scope] = C @ V[:, :, scope, None]
    found: Operands = {}
    for name, site in sites.items():
        scope = site.mask_scope if keep is not None else 0
        G = ups[site.transpose, scope][:, site.layer, site.cores[0] : site.cores[-1] + 1]  # [K, n, r, d]
        D = (V.mT if site.transpose else U)[:, site.layer if keep is not None else 0, scope]
        if site.columns and site.transpose:
            D = D[:, slice(*site.columns)]
        elif site.columns:
            G = G[..., slice(*site.columns)]
        found[name] = D, G.transpose(1, 2).flatten(2)
    return found


def _products(
    C: Tensor, side: Tensor
) -> Tensor:  # [K, layers, cores, r, r'], [K, 1, r', d] -> [K, layers, cores, r, d]
    return (C.flatten(1, 3) @ side[:, 0]).unflatten(1, C.shape[1:4])


def _dropped(factor: Tensor, keep: Tensor) -> Tensor:
    keep = keep.view(-1, *[1] * (factor.dim() - 1))
    return factor * (torch.rand(factor.shape, device=factor.device) < keep) / keep


def _of_blocks(
    U: Tensor,  # [K, d, r]
    C: Tensor,  # [K, blocks, matrices, r, r]
    V: Tensor,  # [K, r, d]
    scale: Tensor,
    sites: Mapping[str, Blocks],
) -> Operands:
    V = V * scale.view(-1, 1, 1)
    found: Operands = {}
    for name, site in sites.items():
        cores = C[:, site.block, site.first : site.last]  # [K, n, r, r]
        if site.rows:
            found[name] = (U[:, None] @ cores).flatten(1, 2), V
        else:
            found[name] = U, (cores @ V[:, None]).transpose(1, 2).flatten(2)
    return found
