"""Provide banks, stacks of layers that use them, and the dense update of a site.

A *bank* is a module that owns factors, and a *site* is the part of a bank that one layer uses. The factors of these
banks are random, so no update is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efft_kernels import EfftLinear, Site, TTFactors
from efft_kernels.nn.factors import Masks

WIDTH = 8


def _sites(kind: str, layer: int) -> dict[str, Site]:
    d = WIDTH
    return {
        "attention": {"qkv": Site(layer, (0, 1, 2)), "proj": Site(layer, (3,))},
        "mlp": {"fc1": Site(layer, (0,)), "fc2": Site(layer, (1,), transpose=True, mask_scope=1)},
        "whole block": {
            "qkv": Site(layer, (0,), columns=(0, 3 * d)),
            "proj": Site(layer, (0,), columns=(3 * d, 4 * d)),
            "fc1": Site(layer, (1,)),
            "fc2": Site(layer, (2,), transpose=True, mask_scope=1),
        },
    }[kind]


def _make_bank(kind: str, n_layers: int = 3, **kwargs: Any) -> tuple[TTFactors, list[Site]]:
    """Return a bank for ``n_layers`` layers and the sites of its layers. ``kind`` is a key in :func:`_sites`."""
    sites = [site for layer in range(n_layers) for site in _sites(kind, layer).values()]
    n_cores = 1 + max(core for site in sites for core in site.cores)
    d_out = WIDTH if kind == "attention" else 4 * WIDTH
    kwargs = {"rank": (3, 5), "scale": 0.7, "dtype": torch.float64, **kwargs}
    # ``scaled`` names the sides, "in" and "out", on which trainable diagonals scale the update. Only some layers have
    # diagonals. Sites with and without diagonals are therefore composed together.
    scaled = kwargs.pop("scaled", ())
    kwargs["scaled_inputs"] = [site for site in sites if "in" in scaled and site.layer != 1]
    kwargs["scaled_outputs"] = [site for site in reversed(sites) if "out" in scaled and site.layer != 0]
    bank = TTFactors(WIDTH, d_out, n_layers=n_layers, n_cores=n_cores, **kwargs)
    for factor in bank.parameters():
        nn.init.normal_(factor, std=0.5)
    return bank, sites


def _update(bank: TTFactors, site: Site, masks: Masks | None = None) -> Tensor:
    """Compute ΔW [in_features, out_features] by its definition. ``masks`` contains the masks of all layers."""
    U, V = bank.U, bank.V
    C = bank.C[site.layer if bank.core_sharing == "per_layer" else 0]
    if masks is not None:
        kept = 1 - bank.dropout
        U = U * masks.U[site.layer, site.mask_scope] / kept
        C = C * masks.C[site.layer] / kept
        V = V * masks.V[site.layer, site.mask_scope] / kept
    if site.columns is not None:
        V = V[:, slice(*site.columns)]
    scales = torch.as_tensor(bank.scale, dtype=U.dtype).expand(bank.n_layers, bank.n_cores)
    blocks = [scales[site.layer, core] * (U @ C[core] @ V) for core in site.cores]
    update = blocks[0].t() if site.transpose else torch.cat(blocks, 1)
    of_input, of_output = bank.diagonals(site)
    update = update if of_input is None else torch.diag(of_input) @ update
    return update if of_output is None else update @ torch.diag(of_output)


class Stack(nn.Module):
    """Run adapted layers, each with its own input.

    If ``prepare`` is True, the bank composes the factors of all layers when a forward pass starts, as in a model.
    """

    def __init__(self, bank: TTFactors, sites: list[Site], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.bank = bank
        features = [bank.sizes(site) for site in sites]
        self.layers = nn.ModuleList(
            EfftLinear(nn.Linear(*size, dtype=dtype), bank, site) for size, site in zip(features, sites, strict=True)
        )
        self.inputs = [torch.randn(4, size[0], dtype=dtype, requires_grad=True) for size in features]
        self.prepare = True

    def run(self, call: Callable[..., Tensor] = lambda layer, x: layer(x)) -> Tensor:
        """Run one forward pass and return its loss. ``call`` applies a layer to its input."""
        if self.prepare:
            self.bank.prepare()
        try:
            outputs = [call(layer, x) for layer, x in zip(self.layers, self.inputs, strict=True)]
        finally:
            if self.prepare:
                self.bank.release()
        return sum(y.square().sum() for y in outputs)

    def gradients(self, call: Callable[..., Tensor] = lambda layer, x: layer(x), seed: int = 0) -> dict[str, Tensor]:
        """Return the loss and all gradients of one forward and backward pass. ``seed`` seeds the random generator."""
        torch.manual_seed(seed)
        leaves = {n: p for n, p in self.bank.named_parameters() if p.requires_grad}
        leaves |= {f"x{i}": x for i, x in enumerate(self.inputs)}
        loss = self.run(call)
        return {
            "loss": loss.detach(),
            **dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)),
        }


@pytest.fixture(params=["attention", "mlp", "whole block"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["per_layer", "shared"])
def core_sharing(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def make_bank() -> Callable[..., tuple[TTFactors, list[Site]]]:
    return _make_bank


@pytest.fixture(scope="session")
def update() -> Callable[..., Tensor]:
    return _update


@pytest.fixture(scope="session")
def make_stack() -> Callable[..., Stack]:
    """Return a function that creates a :class:`Stack` from a kind of bank and the arguments of TTFactors."""
    return lambda kind, dtype=torch.float64, **kwargs: Stack(*_make_bank(kind, **kwargs), dtype=dtype)
