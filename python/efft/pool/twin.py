"""Copy a model without copying its weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from efft_kernels.nn.frozen import is_plain


def twin_of(model: nn.Module) -> nn.Module:
    """Return a copy of the modules of ``model`` that shares the memory of its parameters and buffers.

    Its parameters are separate objects with their own ``requires_grad``, except quantized ones, which are not trained.
    """
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), p.requires_grad) if is_plain(p) else p for p in model.parameters()
    }
    memo |= {id(b): b for b in model.buffers()}
    for module in model.modules():  # bitsandbytes stores parts of a weight in other objects of the layer
        if isinstance(module, nn.Linear) and not is_plain(module.weight):
            memo |= {id(value): value for value in vars(module).values() if hasattr(value, "__dict__")}
    return copy.deepcopy(model, memo)


def set_parameters(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Replace the parameters that have these names."""
    for name, parameter in parameters.items():
        owner, _, own = name.rpartition(".")
        model.get_submodule(owner)._parameters[own] = parameter


def find(model: nn.Module, name: str) -> nn.Module | None:
    """Return the module with this name; None if the model has none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
