"""Adapt the experts of a model or module manually, and compute the expected updates."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from efft.adapting.experts import adapt_experts, experts_of
from efft_kernels import ExpertWeight, Site, TTFactors


class AdaptedModel:
    """Adapt a model's experts with one shared tensor train. ``dense`` returns the expected update of a parameter."""

    def __init__(self, model: nn.Module, std: float = 0.3, **kwargs: Any) -> None:
        self.model = model
        self.modules = {name: m for name, m in model.named_modules() if experts_of(m) is not None}
        first = next(iter(self.modules.values()))
        found = experts_of(first)
        up = found.parameters[0]
        n, dtype = found.n_experts, next(first.parameters()).dtype
        kwargs = {"rank": (3, 4), "scale": 0.7, "dtype": dtype, **kwargs}
        n_cores = n * sum(p.blocks for p in found.parameters)
        self.bank = TTFactors(up.d_in, up.d_out // up.blocks, n_layers=len(self.modules), n_cores=n_cores, **kwargs)
        if std:
            for factor in self.bank.parameters():
                nn.init.normal_(factor, std=std)
        self.weights: dict[str, ExpertWeight] = {}
        for layer, (name, module) in enumerate(self.modules.items()):
            taken, sites = 0, {}
            for p in experts_of(module).parameters:
                cores = tuple(range(taken, taken + n * p.blocks))
                taken += len(cores)
                site = Site(layer, cores, p.second, mask_scope=int(p.second), experts=n, interleaved=p.interleaved)
                sites[p.name] = (self.bank, site)
            weights = adapt_experts(module, sites)
            self.weights |= {f"{name}.{parameter}".lstrip("."): w for parameter, w in weights.items()}

    def dense(self, weight: ExpertWeight) -> Tensor:
        """Compute the update by its definition, with autograd. The result has the layout of the parameter."""
        bank, site = self.bank, weight.site
        blocks = bank.initial_scale * (bank.U @ bank.C[site.layer, list(site.cores)] @ bank.V)
        blocks = (blocks.transpose(1, 2) if site.transpose else blocks).unflatten(0, (site.experts, -1))
        matrices = blocks.movedim(1, -1 if site.interleaved else -2).flatten(-2)  # [experts, d_in, d_out]
        return matrices if weight.view == "experts transposed" else matrices.transpose(1, 2)

    def effective(self) -> dict[str, Tensor]:
        """Compute the sums of weights and updates by name, with autograd."""
        return {name: weight.stored.detach() + self.dense(weight) for name, weight in self.weights.items()}
