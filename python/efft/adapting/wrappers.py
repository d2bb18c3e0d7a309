"""Recognize wrappers around a model: those of DDP, FSDP, DataParallel, DeepSpeed, torch.compile and accelerate."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import torch
from torch import nn

#: Names of wrappers that record the parameters of a model when they are created. Some builds of torch lack the classes.
_HOLDERS = {"DistributedDataParallel", "FullyShardedDataParallel", "DataParallel", "DeepSpeedEngine"}
#: Attributes in which wrappers store the wrapped module. They are not a part of the names of the plain model.
_TRANSPARENT = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside its wrappers.

    A wrapper is a module that contains only one other module, under a name that the known wrappers use.
    """
    while len(model._modules) == 1 and not model._parameters and not model._buffers:
        name, inner = next(iter(model._modules.items()))
        if inner is None or name not in ("module", *_TRANSPARENT):
            break
        model = inner
    return model


def plain_name(name: str) -> str:
    """Return the name of a parameter or module without the parts that compiled and checkpointed modules add."""
    return ".".join(part for part in name.split(".") if part not in _TRANSPARENT)


def check_unwrapped(model: nn.Module, operation: str) -> None:
    """Check that no wrapper has recorded the parameters of ``model``, for an ``efft.operation`` that adds parameters.

    A wrapper does not average the gradients of factors that it does not know. Every process would then train its own
    factors.

    Raises:
        ValueError: a wrapper has recorded the parameters.
    """
    within = next((module for module in model.modules() if _is_holder(module)), None)
    around = None if within is not None else _around(model)
    holder = within or around
    if holder is None:
        return
    kind = type(holder).__name__
    got = f"this {type(model).__name__} " + ("contains" if within is not None else "is inside") + f" a {kind}"
    raise ValueError(
        f"expected a plain model, but {f'got a {kind}' if holder is model else got}, which would not know the factors, "
        f"so every process would train its own: call efft.{operation} on the plain model, then wrap it"
    )


def holder_kind(module: nn.Module) -> str | None:
    """Return the name of the known wrapper class that a module belongs to, or None if it is not such a wrapper."""
    return next((kind.__name__ for kind in type(module).__mro__ if kind.__name__ in _HOLDERS), None)


def _is_holder(module: nn.Module) -> bool:
    return holder_kind(module) is not None


def _around(model: nn.Module) -> nn.Module | None:
    """Return a wrapper that holds ``model`` and is still in use, or None."""
    if next((True for holder in _holders() if _holds(holder, model)), False):
        gc.collect()
    return next((holder for holder in _holders() if _holds(holder, model)), None)


def _holders() -> Iterator[nn.Module]:
    """Yield the wrappers that exist in this process.

    A module does not know its wrappers, so this function searches all objects. It searches only if torch.distributed is
    initialized, because otherwise no process shares its work with others.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return
    for candidate in gc.get_objects():
        if issubclass(type(candidate), nn.Module) and _is_holder(candidate):
            yield candidate


def _holds(holder: nn.Module, model: nn.Module) -> bool:
    # A wrapper that is being constructed, or was taken apart, has no modules.
    return "_modules" in holder.__dict__ and any(module is model for module in holder.modules())
