"""Putting an update where a weight is, whatever kind of weight it is, and finding it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from efft.adapting.experts import adapt_experts
from efft.config import AdapterConfig
from efft.planning.structure import Weight
from efft_kernels import FactorBank
from efft_kernels.nn.adapt import layer_class
from efft_kernels.nn.linear import AdaptedLayer
from efft_kernels.nn.parameter import AdaptedParameter, adapt_parameter

#: What stands for an adapted weight: the adapted layer itself, or an object beside the module.
Update = AdaptedLayer | AdaptedParameter


def make_layers(
    model: nn.Module, weights: Mapping[str, tuple[Weight, FactorBank, Any]], config: AdapterConfig
) -> dict[str, tuple[nn.Module, AdaptedLayer]]:
    """For each weight of a layer that is called: the layer, and the adapted one to put in its place."""
    made = {}
    for name, (weight, bank, site) in weights.items():
        if weight.kind in ("parameter", "experts"):
            continue
        layer = model.get_submodule(weight.module)
        kind = config.layer if isinstance(layer, nn.Linear) else layer_class(layer)
        assert kind is not None
        made[name] = layer, kind(layer, bank, site)
    return made


def adapt_in_place(model: nn.Module, weights: Mapping[str, tuple[Weight, FactorBank, Any]]) -> None:
    """Adapt the weights of modules that stay where they are."""
    experts: dict[str, dict[str, tuple[Any, Any]]] = {}
    for weight, bank, site in weights.values():
        if weight.kind == "parameter":
            adapt_parameter(model.get_submodule(weight.module), weight.parameter, bank, site, weight.read_as)
        elif weight.kind == "experts":
            experts.setdefault(weight.module, {})[weight.parameter] = bank, site
    for name, sites in experts.items():
        adapt_experts(model.get_submodule(name), sites)


def locate(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns the weight ``name``, and the name of its parameter.

    Raises:
        AttributeError: there is neither a module nor a parameter of this name.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError:
        owner, _, parameter = name.rpartition(".")
        module = model.get_submodule(owner)
        if parameter not in module._parameters:
            raise
        return module, parameter
    return module, "weight"


def updates_by_parameter(model: nn.Module) -> dict[str, Update]:
    """Every update by each full name of its parameter in the state dict."""
    found: dict[str, Update] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        own: dict[str, Update] = {**getattr(module, "adapted_parameters", {})}
        if isinstance(module, AdaptedLayer):
            own["weight"] = module
        found |= {f"{name}.{parameter}".lstrip("."): update for parameter, update in own.items()}
    return found


def find_update(model: nn.Module, name: str) -> Update | None:
    """The update of the adapted weight ``name``; None where there is none."""
    module, parameter = locate(model, name)
    if isinstance(module, AdaptedLayer):
        return module
    found: Update | None = getattr(module, "adapted_parameters", {}).get(parameter)
    return found


def linear_layers(updates: Mapping[str, Update]) -> dict[str, AdaptedLayer]:
    """The updates, if all are of linear layers, for what serves those alone.

    Raises:
        ValueError: one is of another weight.
    """
    layers: dict[str, AdaptedLayer] = {}
    for name, update in updates.items():
        if not isinstance(update, AdaptedLayer) or not isinstance(update, nn.Linear):
            kind = type(update).__name__ if isinstance(update, AdaptedLayer) else "a parameter that a module reads"
            raise ValueError(
                f"a pool serves adapters of linear layers, and {name} is {kind}: adapt with targets that leave it out"
            )
        layers[name] = update
    return layers
