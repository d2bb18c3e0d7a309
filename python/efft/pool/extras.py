"""Let the adapters of an ``AdapterPool`` have their own values of biases and norms.

A *stack* holds the values of one parameter for all adapters, one per row. The *slot* of an adapter is its row.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from efft_kernels.nn.pooled import Selection

#: Maps a class of modules and names of its parameters to a subclass that reads these parameters from stacks.
_classes: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def read_from_stacks(module: nn.Module, stacks: Mapping[str, Tensor], selected: ContextVar[Selection | None]) -> None:
    """Make ``module`` compute with the values of the selected adapters.

    The function stores ``stacks`` and ``selected`` in the module's ``__dict__``. It also replaces the class of the
    module by a subclass of the same name, in which the parameters are properties. A property returns the stored
    parameter unless adapters are selected for the whole batch.

    Args:
        module: owns the parameters.
        stacks: maps the name of each parameter to the values for all adapters, ``[n, *shape]``. Row 0 contains the
            value of the base.
        selected: the :class:`Selection` of the running context.
    """
    base: Any = getattr(type(module), "_pooled_base", type(module))
    module.__dict__["_pooled_stacks"], module.__dict__["_pooled_selected"] = dict(stacks), selected
    names = tuple(stacks)
    if (base, names) not in _classes:
        parts: dict[str, Any] = {name: _property(name) for name in names}
        parts |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        _classes[base, names] = type(base.__name__, (base,), {**parts, "_pooled_base": base})
    module.__class__ = _classes[base, names]


def reads_from_stacks(module: nn.Module) -> bool:
    """Return whether the parameters of a module are read from stacks (:func:`read_from_stacks`)."""
    return hasattr(type(module), "_pooled_base")


def read_own(module: nn.Module) -> None:
    """Undo :func:`read_from_stacks`."""
    kind: Any = type(module)
    module.__class__ = kind._pooled_base
    del module.__dict__["_pooled_stacks"], module.__dict__["_pooled_selected"]


def mixed(stack: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of the rows ``slots`` of a stack, in the dtype of the stack."""
    rows = stack[slots]
    return (weights.view(-1, *[1] * (rows.dim() - 1)) * rows).sum(0).to(stack.dtype)


@torch.no_grad()
def write_extras(
    stacks: Mapping[str, Tensor], new: Mapping[str, Tensor], base: Mapping[str, Tensor], slot: int, rows: int
) -> dict[str, Tensor]:
    """Write the values of an adapter into row ``slot``, and return the stacks.

    A stack that has ``rows`` rows is changed in place. Other stacks are replaced by larger copies, and missing stacks
    are created. If the adapter has no value for a parameter, the value in ``base`` is written.
    """
    result = {}
    for name in [*stacks, *(name for name in new if name not in stacks)]:
        old = stacks.get(name)
        stack = old if old is not None and len(old) == rows else base[name].expand(rows, *base[name].shape).clone()
        if old is not None and stack is not old:
            stack[: len(old)].copy_(old)
        stack[slot].copy_(new.get(name, base[name]))
        result[name] = stack
    return result


def _property(name: str) -> property:
    def read(module: Any) -> Tensor:
        selection: Selection | None = module._pooled_selected.get()
        if selection is None or selection.weights is None:
            stored: Tensor = module._parameters[name]
            return stored
        return mixed(module._pooled_stacks[name], selection.slots, selection.weights)

    return property(read)
