"""What stands around a model: DDP, FSDP, DataParallel, DeepSpeed's engine, what torch.compile and accelerate make."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import torch
from torch import nn

#: Classes that hold on to the parameters they found, by name: not every build of torch has them.
_HOLDERS = {"DistributedDataParallel", "FullyShardedDataParallel", "DataParallel", "DeepSpeedEngine"}
#: Where modules keep the one that they stand for under the same name.
_TRANSPARENT = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside wrappers: modules that have nothing but another one, as those of this file do."""
    while len(model._modules) == 1 and not model._parameters and not model._buffers:
        name, inner = next(iter(model._modules.items()))
        if inner is None or name not in ("module", *_TRANSPARENT):
            break
        model = inner
    return model


def plain_name(name: str) -> str:
    """A parameter's or module's name without what compiled and checkpointed modules put into it."""
    return ".".join(part for part in name.split(".") if part not in _TRANSPARENT)


def check_unwrapped(model: nn.Module, operation: str) -> None:
    """Raise ValueError if something holds the parameters of ``model`` already, for an ``efft.operation`` that adds
    some.

    Gradients of factors that a wrapper does not know are not averaged: every process would train its own.
    """
    within = next((module for module in model.modules() if _is_holder(module)), None)
    around = None if within is not None else _around(model)
    holder = within or around
    if holder is None:
        return
    kind = type(holder).__name__
    got = f"this {type(model).__name__} " + ("contains" if within is not None else "is inside") + f" a {kind}"
    raise ValueError(
        f"expected a plain model, {f'got a {kind}' if holder is model else got}, which would not know the factors, so "
        f"that every process trained its own: call efft.{operation} on the plain model, then wrap it"
    )


def _is_holder(module: nn.Module) -> bool:
    return any(kind.__name__ in _HOLDERS for kind in type(module).__mro__)


def _around(model: nn.Module) -> nn.Module | None:
    """What holds ``model``, not counting what nobody uses any more."""
    if next((True for holder in _holders() if _holds(holder, model)), False):
        gc.collect()
    return next((holder for holder in _holders() if _holds(holder, model)), None)


def _holders() -> Iterator[nn.Module]:
    """The wrappers that live in this process.

    A module does not know what wraps it, so this looks among all objects, where processes work together at all.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return
    for candidate in gc.get_objects():
        if issubclass(type(candidate), nn.Module) and _is_holder(candidate):
            yield candidate


def _holds(holder: nn.Module, model: nn.Module) -> bool:
    # What is in construction, or was taken apart, has no modules.
    return "_modules" in holder.__dict__ and any(module is model for module in holder.modules())
