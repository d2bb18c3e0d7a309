"""Support models that the library accelerate manages.

accelerate sets hooks on the modules. The hooks load offloaded weights from memory or disk when a layer runs, or they
distribute the layers over several devices.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from efft_kernels.nn.parameter import adapted_weights_of

#: Attributes that accelerate sets on a module to replace its forward.
_SET = ("_hf_hook", "_old_forward", "forward")

Aside = dict[nn.Module, dict[str, Any]]


@contextmanager
def hooks_aside(model: nn.Module) -> Iterator[Aside]:
    """Remove accelerate's hooks from the modules within the ``with`` block, and restore the hooks after the block.

    Yield the removed attributes of each module. :func:`follow` transfers them to modules that replace other modules.
    """
    aside: Aside = {
        module: {key: module.__dict__.pop(key) for key in _SET}
        for module in model.modules()
        if all(key in module.__dict__ for key in _SET)
    }
    kinds = {module: type(module) for module in aside}
    try:
        yield aside
    finally:
        follow(aside, {module: module for module, kind in kinds.items() if type(module) is not kind})
        for module, attributes in aside.items():
            module.__dict__.update(attributes)


def follow(aside: Aside, replaced: Mapping[nn.Module, nn.Module]) -> None:
    """Transfer hooks to new modules. ``replaced`` maps each old module to the new module that replaces it."""
    for old, new in replaced.items():
        attributes = aside.pop(old, None)
        if attributes is not None:
            own: Any = new.forward
            forward = functools.update_wrapper(functools.partial(attributes["forward"].func, new), own)
            hook: Any = getattr(attributes["_hf_hook"], "_of", attributes["_hf_hook"])
            hook = _past_updates(hook) if adapted_weights_of(new) else hook
            aside[new] = {"_hf_hook": hook, "_old_forward": own, "forward": forward}


class _PastUpdates:
    """Make a hook of accelerate move the stored weights of an adapted module instead of its effective weights.

    Reading a parameter of such a module returns the effective weight, which includes the update. The updates are
    therefore switched off while the hook moves the weights. This class is a mixin for the class of the hook.
    """

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _switched_off(module):
            return super().pre_forward(module, *args, **kwargs)  # type: ignore[misc]

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        with _switched_off(module):
            return super().post_forward(module, output)  # type: ignore[misc]


def _past_updates(hook: Any) -> Any:
    """Return a copy of a hook that moves the stored weights (:class:`_PastUpdates`)."""
    new = copy.copy(hook)
    kind: type = type(hook)
    new.__class__ = _kind(kind)
    new._of = hook
    return new


@functools.cache
def _kind(hook: type) -> type:
    return type(hook.__name__, (_PastUpdates, hook), {"__module__": hook.__module__})


@contextmanager
def _switched_off(module: nn.Module) -> Iterator[None]:
    updates = [(update, update.enabled) for update in adapted_weights_of(module)]
    for update, _ in updates:
        update.enabled = False
    try:
        yield
    finally:
        for update, enabled in updates:
            update.enabled = enabled


def device_of(aside: Aside, owners: Mapping[str, tuple[nn.Module, str]]) -> torch.device:
    """Return the device on which the layers whose weights share factors compute.

    Args:
        aside: the value that :func:`hooks_aside` yields.
        owners: maps the name of each weight to its module and to the name of its parameter.

    Raises:
        ValueError: the layers compute on several devices.
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
            f"expected the layers that share factors on one device, got {first!r} on {device} and {other!r} on "
            f"{devices[other]}: load the model onto one device (device_map={{'': 0}}), if necessary with offloading"
        )
    return device


def stored(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Return a parameter of a module, or its value in accelerate's storage if accelerate has offloaded it."""
    weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    if not tensor.is_meta or weights is None:
        return tensor
    found: Tensor = weights[name]
    return found


def check_present(model: nn.Module, operation: str) -> None:
    """Check that no weights are offloaded, for an ``efft.operation`` that reads or changes them.

    Raises:
        ValueError: weights are offloaded.
    """
    away = [
        name
        for name, module in model.named_modules()
        if getattr(getattr(module, "_hf_hook", None), "offload", False)
        and any(p is not None and p.is_meta for p in module._parameters.values())
    ]
    if away:
        raise ValueError(
            f"efft.{operation}: the weights of {len(away)} layers ({away[0]!r} first) are offloaded to memory or disk: "
            f"save the adapter, load it onto a base without offloading, and call efft.{operation} there"
        )
