"""Add updates to weights of all kinds, and find the update of a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from efft.adapting.experts import intercept
from efft.adapting.wrappers import unwrap
from efft.config import AdapterConfig
from efft.planning.structure import Weight
from efft_kernels import FactorBank
from efft_kernels.nn.adapt import adapt
from efft_kernels.nn.linear import AdaptedLayer
from efft_kernels.nn.parameter import AdaptedParameter

#: The update of a weight. For the weight of a layer it is the adapted layer itself. For a parameter that a module reads
#: it is an object in the ``adapted_parameters`` of the module.
Update = AdaptedLayer | AdaptedParameter


def place(
    model: nn.Module, weights: Mapping[str, tuple[Weight, FactorBank, Any]], config: AdapterConfig
) -> dict[str, Update]:
    """Adapt weights of ``model`` in place.

    Args:
        model: the model.
        weights: maps the name of each weight to its description, its bank (the module that owns its factors), and its
            site (the part of the bank that it uses).
        config: the configuration; its attribute ``layer`` is the class of adapted linear layers.

    Returns:
        The update of each weight, by its name.

    Raises:
        TypeError: a weight cannot be adapted; no module is replaced then.
        ValueError: sizes do not fit; no module is replaced then.
    """
    sites: dict[str, tuple[FactorBank, Any]] = {}
    views: dict[str, str] = {}
    of: dict[str, str] = {}  # name of the weight -> its name in the call of adapt()
    # A bank composes its sites in the order in which they are bound: layers first, then parameters, experts last.
    for name in sorted(weights, key=lambda name: _READ.get(weights[name][0].kind, 0)):
        weight, bank, site = weights[name]
        if weight.kind not in _READ:
            of[name] = name
        else:
            of[name] = full = f"{weight.module}.{weight.parameter}".lstrip(".")
            views[full] = weight.read_as if weight.experts is None else weight.experts.view
        if weight.kind == "experts":
            intercept(model.get_submodule(weight.module))
        sites[of[name]] = bank, site
    adapted: Mapping[str, Any] = adapt(model, sites, views=views, kind=config.layer)
    return {name: adapted[of[name]] for name in weights}


#: The kinds of weights that are read by the module that owns them. Such a module is not replaced. The numbers give the
#: order in which the sites are bound.
_READ = {"parameter": 1, "experts": 2}


def locate(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that owns the weight ``name``, and the name of its parameter.

    Raises:
        AttributeError: the model has neither a module nor a parameter of this name.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError:
        owner, _, parameter = name.rpartition(".")
        module = unwrap(model.get_submodule(owner))
        if parameter not in module._parameters:
            raise
        return module, parameter
    return unwrap(module), "weight"


def updates_by_parameter(model: nn.Module) -> dict[str, Update]:
    """Return every update under each full name that its parameter has in the state dict."""
    found: dict[str, Update] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        own: dict[str, Update] = {**getattr(module, "adapted_parameters", {})}
        if isinstance(module, AdaptedLayer):
            own["weight"] = module
        found |= {f"{name}.{parameter}".lstrip("."): update for parameter, update in own.items()}
    return found


def find_update(model: nn.Module, name: str) -> Update | None:
    """Return the update of the weight ``name``, or None if it has none or if the model does not have this weight."""
    try:
        module, parameter = locate(model, name)
    except AttributeError:
        return None
    if isinstance(module, AdaptedLayer):
        return module
    found: Update | None = getattr(module, "adapted_parameters", {}).get(parameter)
    return found


def linear_layers(updates: Mapping[str, Update]) -> dict[str, AdaptedLayer]:
    """Check that all updates belong to linear layers, and return them with this type.

    Raises:
        ValueError: an update belongs to another kind of weight.
    """
    layers: dict[str, AdaptedLayer] = {}
    for name, update in updates.items():
        if not isinstance(update, AdaptedLayer) or not isinstance(update, nn.Linear):
            kind = type(update).__name__ if isinstance(update, AdaptedLayer) else "a parameter that a module reads"
            raise ValueError(
                f"only adapters of linear layers can share a model (AdapterPool, SharedBackbone), but {name!r} is "
                f"{kind}: exclude it when you adapt the model"
            )
        layers[name] = update
    return layers
