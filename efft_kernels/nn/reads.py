"""Find the parameters that the methods of a module class read directly, by inspecting the bytecode of the methods."""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Iterator

from torch import nn

#: Prefixes of the names of methods that read parameters only to initialize, load, save or print them.
_ASIDE = ("reset", "init", "_init", "_load", "load", "_save", "extra_repr", "__init__", "__setstate__", "__repr__")

#: Attributes of a tensor that do not depend on its values.
_METADATA = {"dtype", "device", "shape", "size", "ndim", "dim", "numel", "layout", "is_cuda", "requires_grad", "stride"}
_METADATA |= {"is_meta", "is_floating_point", "get_device", "element_size", "itemsize", "is_nested", "is_quantized"}

#: Functions that do not use the values of their arguments.
_ASKS = {"isinstance", "type", "id", "len"}


@functools.cache
def reads_weight_of_children(kind: type[nn.Module]) -> frozenset[str]:
    """Return the names of attributes that methods of class ``kind`` read and that may be parameters.

    For ``self.qkv.weight`` the name is ``"qkv.weight"``, and for ``self.in_proj_weight`` it is ``"in_proj_weight"``.
    Reads of only a dtype or a shape are excluded. The caller must find out from the module which names are parameters.
    This function does not find reads through a variable (``qkv = self.qkv``), which other code detects while the model
    runs.
    """
    own = [cls for cls in kind.__mro__ if issubclass(cls, nn.Module) and cls is not nn.Module]
    codes: list[types.CodeType] = []
    overridden: set[str] = set()
    for cls in own:
        for name, value in vars(cls).items():
            function = value.fget if isinstance(value, property) else inspect.unwrap(value)
            if isinstance(function, types.FunctionType) and not name.startswith(_ASIDE) and name not in overridden:
                codes.append(function.__code__)
                if "super" not in function.__code__.co_names:
                    overridden.add(name)
    return frozenset(".".join(chain) for code in codes for chain in _chains(code))


def _chains(code: types.CodeType, module: str | None = None) -> Iterator[list[str]]:
    """Yield the attribute chains that start at a method's first argument, in the method and its inner functions."""
    module = module or (code.co_varnames[0] if code.co_argcount else None)
    if module is None:
        return
    chain: list[str] | None = None
    called = False  # whether the next value is an argument of a function in _ASKS
    for instruction in dis.get_instructions(code):
        if chain is not None and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chain.append(instruction.argval)
            continue
        if instruction.opname in ("CACHE", "EXTENDED_ARG"):
            continue
        if chain is not None and not called:
            yield from _values(chain)
        if instruction.opname == "PUSH_NULL":
            continue
        starts = _loads(instruction, module)
        called = instruction.argval in _ASKS if instruction.opname == "LOAD_GLOBAL" else called and starts
        chain = [] if starts else None
    if chain is not None:
        yield from _values(chain)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType) and module in constant.co_freevars:
            yield from _chains(constant, module)


def _loads(instruction: dis.Instruction, variable: str) -> bool:
    if not instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLASSDEREF")):
        return False
    loaded = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
    return bool(loaded[-1] == variable)  # if one instruction loads several variables, the last is on top of the stack


def _values(chain: list[str]) -> Iterator[list[str]]:
    """Yield the prefixes of a chain that may be a parameter whose values are read: ``a.weight`` for ``a.weight.t``."""
    for i in range(1, len(chain) + 1):
        if i == len(chain) or chain[i] not in _METADATA:
            yield chain[:i]
