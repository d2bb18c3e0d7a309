"""Models whose weights accelerate brings from memory or disk when a layer runs, or spreads over devices."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

#: What accelerate sets on a module, whose forward it replaces.
_SET = ("_hf_hook", "_old_forward", "forward")

Aside = dict[nn.Module, dict[str, Any]]


@contextmanager
def hooks_aside(model: nn.Module) -> Iterator[Aside]:
    """Within the ``with`` block the modules have their own forwards; after it accelerate's again.

    Modules that take the place of others get theirs by :func:`follow`.
    """
    aside: Aside = {
        module: {key: module.__dict__.pop(key) for key in _SET}
        for module in model.modules()
        if all(key in module.__dict__ for key in _SET)
    }
    try:
        yield aside
    finally:
        for module, attributes in aside.items():
            module.__dict__.update(attributes)


def follow(aside: Aside, replaced: Mapping[nn.Module, nn.Module]) -> None:
    """Let the new modules of ``replaced``, old to new, have the hooks of the old ones."""
    for old, new in replaced.items():
        attributes = aside.pop(old, None)
        if attributes is not None:
            own: Any = new.forward
            forward = functools.partial(attributes["forward"].func, new)
            aside[new] = {**attributes, "_old_forward": own, "forward": functools.update_wrapper(forward, own)}


def device_of(aside: Aside, owners: Mapping[str, tuple[nn.Module, str]]) -> torch.device:
    """Where the weights compute that share factors, by name; ``owners`` are their modules and parameters.

    Raises:
        ValueError: on several devices.
    """
    devices = {}
    for name, (layer, parameter) in owners.items():
        hook = aside.get(layer, {}).get("_hf_hook")
        execution = getattr(hook, "execution_device", None)
        weight = layer._parameters[parameter]
        assert weight is not None
        devices[name] = weight.device if execution is None else torch.empty(0, device=execution).device
    first, device = next(iter(devices.items()))
    other = next((name for name in devices if devices[name] != device), None)
    if other is not None:
        raise ValueError(
            f"expected the layers that share factors on one device, got {first} on {device} and {other} on "
            f"{devices[other]}: load the model onto one device (device_map={{'': 0}}), offloaded where it does not fit"
        )
    return device


def stored(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A parameter of a module, from where it is while the module does not run."""
    weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    if not tensor.is_meta or weights is None:
        return tensor
    found: Tensor = weights[name]
    return found


def check_present(model: nn.Module, operation: str) -> None:
    """Raise ValueError if weights are offloaded, for an ``efft.operation`` that reads or changes them."""
    away = [
        name
        for name, module in model.named_modules()
        if getattr(getattr(module, "_hf_hook", None), "offload", False)
        and any(p is not None and p.is_meta for p in module._parameters.values())
    ]
    if away:
        raise ValueError(
            f"efft.{operation}: the weights of {len(away)} layers ({away[0]} first) are offloaded, to memory or disk: "
            "save the adapter, load it onto the base loaded without offloading, and do it there"
        )
