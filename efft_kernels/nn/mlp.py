"""Compute a whole MLP, two adapted layers with a GELU between them, with the op ``tt_mlp``.

:func:`fuse_mlp` replaces the forward method of the module that calls these layers. It does so only if this method does
nothing but call submodules, each with the output of the previous one. The names of these submodules in the order of the
calls are the *chain* of the module. To find the chain, the method is called with a :class:`_Recorder` instead of the
module and with a :class:`_Marker` instead of the input. In addition, the code of the method must contain no names
except those of the submodules. Therefore it cannot use anything else, such as a context that disables autocast.

A call of a fused module checks that ``tt_mlp`` computes the same as the submodules from the first layer to the second
one. Otherwise it calls the submodules as usual. The output of the first layer is never visible outside of the op.
Therefore nothing else can read or change it, unlike the output of a module that :mod:`efft_kernels.nn.producers` fuses.
"""

from __future__ import annotations

import functools
import itertools
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from efft_kernels._calls import is_transformed
from efft_kernels.nn.frozen import stored_in
from efft_kernels.nn.linear import EfftLinear, multiplies_plainly
from efft_kernels.nn.producers import ProducerOutput, approximation, replaced_forward
from efft_kernels.ops import tt_mlp


class _Chain(NamedTuple):
    """Hold the names of the submodules that a module calls, in the order of the calls.

    Attributes:
        names: the names of the submodules.
        first, gelu, second: the indices in ``names`` of the first layer, the GELU and the second layer.
        is_all: whether the module calls all its submodules, as an ``nn.Sequential`` does.
        method: the forward method of the module's class.
    """

    names: tuple[str, ...]
    first: int
    gelu: int
    second: int
    is_all: bool
    method: Any


def fuse_mlp(module: nn.Module) -> bool:
    """Make ``module`` compute the MLP among its submodules with one op.

    The MLP consists of an :class:`efft_kernels.EfftLinear`, a GELU that
    :func:`efft_kernels.nn.producers.fuse_producer` has fused, and another :class:`efft_kernels.EfftLinear`. Between
    them may be identities and dropouts. If the input of the MLP is the postponed output of a LayerNorm, the op also
    computes the norm.

    The module calls its submodules as usual in compiled, exported and traced code, in the transforms of ``torch.func``,
    while one of the submodules of the MLP has hooks, is disabled or merged, drops elements, was replaced, or has a
    forward method that was set on the instance, and while a base weight is trained or quantized. This is also the case
    if the class of the module has another forward method than when it was fused.

    Returns:
        Whether the module was fused. Otherwise nothing is changed. This is the case if the module is fused already,
        its ``forward`` was replaced on the instance, or its forward method is not such a chain of calls.
    """
    if "forward" in module.__dict__:
        return False
    chain = _chain_of(module)
    if chain is None:
        return False
    module.__dict__["forward"] = functools.partial(_forward, module, chain)
    return True


def unfuse_mlp(module: nn.Module) -> None:
    """Undo :func:`fuse_mlp`. Leave other modules unchanged."""
    if replaced_forward(module, _forward) is not None:
        del module.__dict__["forward"]


class _Refused(Exception):
    """Report that a forward method does something other than to call submodules."""


class _Marker:
    """Stand in for a tensor that only submodules may use."""

    def __bool__(self) -> bool:
        raise _Refused("the forward method depends on its input")


class _Recorder:
    """Stand in for a module in a call of its forward method, and record the names of the submodules that it calls.

    Each submodule returns a new marker, and accepts only the marker that the previous submodule returned. Therefore the
    method can neither use an output twice nor compute anything with it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.__dict__["_state"] = (module._modules, [], [_Marker()])

    def __getattr__(self, name: str) -> Any:
        modules, names, markers = self.__dict__["_state"]
        if modules.get(name) is None:
            raise _Refused(f"the forward method uses {name!r}, which is not a submodule")

        def call(marker: object) -> object:
            if marker is not markers[-1]:
                raise _Refused(f"the input of {name!r} is not the output of the previous submodule")
            names.append(name)
            markers.append(_Marker())
            return markers[-1]

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        raise _Refused(f"the forward method sets {name!r}")


def _names(module: Any) -> list[str]:
    """Return the names of the submodules that the forward method calls in turn; none if it does anything else."""
    forward = type(module).forward
    if forward is nn.Sequential.forward:
        return list(module._modules) if type(module).__iter__ is nn.Sequential.__iter__ else []
    if not isinstance(forward, FunctionType):
        return []
    defaults = (*(forward.__defaults__ or ()), *(forward.__kwdefaults__ or {}).values())
    if not all(isinstance(default, (bool, int, float, str, type(None))) for default in defaults):
        return []  # the method may use such an object, for example as a context
    recorder = _Recorder(module)
    _, names, markers = recorder.__dict__["_state"]
    try:
        result = forward(recorder, markers[0])
    except Exception:  # raised by any use of the recorder or of a marker that these do not support
        return []
    code, used = forward.__code__, set(names)
    only_calls = used.issuperset(code.co_names) and not code.co_freevars
    only_calls &= not any(isinstance(constant, CodeType) for constant in code.co_consts)  # code of inner functions
    return names if only_calls and result is markers[-1] and len(used) == len(names) else []


def _chain_of(module: Any) -> _Chain | None:
    """Return the chain of the first MLP among the submodules that ``module`` calls; None if there is no MLP."""
    children = list(module._modules.values())
    if sum(type(child) is EfftLinear for child in children) < 2 or not any(map(_is_gelu, children)):
        return None
    names = _names(module)
    kinds = [module._modules[name] for name in names]
    layers = [i for i, kind in enumerate(kinds) if type(kind) is EfftLinear]
    for first, second in itertools.pairwise(layers):
        gelus = [i for i in range(first + 1, second) if _is_gelu(kinds[i])]
        others = [kinds[i] for i in range(first + 1, second) if i not in gelus]
        if len(gelus) == 1 and all(isinstance(other, (nn.Identity, nn.Dropout)) for other in others):
            method = type(module).forward
            return _Chain(tuple(names), first, gelus[0], second, method is nn.Sequential.forward, method)
    return None


def _is_gelu(module: nn.Module | None) -> bool:
    """Return whether ``module`` is a GELU that :func:`efft_kernels.nn.producers.fuse_producer` has fused."""
    return module is not None and approximation(module) is not None


def _forward(module: Any, chain: _Chain, *args: Any, **kwargs: Any) -> Any:
    """Call the submodules of the chain in turn, and replace those of the MLP by one op if the op computes the same."""
    modules = module._modules
    if len(args) != 1 or kwargs or type(module).forward is not chain.method or not _can_run(modules, chain):
        return type(module).forward(module, *args, **kwargs)
    (x,) = args
    names = chain.names
    for name in names[: chain.first]:
        x = modules[name](x)
    rest = names[chain.first :]
    if _is_input(x):
        x = _mlp(x, modules[names[chain.first]], modules[names[chain.gelu]], modules[names[chain.second]])
        rest = names[chain.second + 1 :]
    for name in rest:
        x = modules[name](x)
    return x


def _can_run(modules: Any, chain: _Chain) -> bool:
    """Return whether the op computes the same as calls of the submodules from the first layer to the second one."""
    if is_transformed() or _has_any_global_hook() or (chain.is_all and tuple(modules) != chain.names):
        return False
    for i in range(chain.first, chain.second + 1):
        module = modules.get(chain.names[i])
        if module is None or _has_hooks(own := module.__dict__):
            return False
        if i == chain.gelu:
            if not _is_gelu(module) or type(module).__call__ is not nn.Module.__call__:
                return False
        elif "forward" in own:
            return False
        elif i in (chain.first, chain.second):
            if not (type(module) is EfftLinear and module.enabled and not module.binding.merged and _is_frozen(module)):
                return False
        elif not (
            type(module) is nn.Identity or (type(module) is nn.Dropout and (module.p == 0 or not module.training))
        ):
            return False
    return True


def _has_hooks(own: dict[str, Any]) -> bool:
    """Return whether a call of the module with the attributes ``own`` does more than to call its forward method."""
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or own.get("_compiled_call_impl")
    )


def _is_frozen(layer: EfftLinear) -> bool:
    """Return whether the base weight is a dense tensor that is not trained."""
    W = stored_in(layer, "weight")
    return multiplies_plainly(layer, W) and not W.requires_grad


def _is_input(x: object) -> bool:
    """Return whether ``x`` is an ordinary tensor or the postponed output of a LayerNorm."""
    return x.approximate is None if isinstance(x, ProducerOutput) else type(x) is Tensor


def _mlp(x: Tensor, first: EfftLinear, gelu: nn.Module, second: EfftLinear) -> Tensor:
    """Compute ``second(gelu(first(x)))`` with one op, which includes the norm if ``x`` is a postponed output."""
    W1, b1, D1, G1 = _operands(first)
    W2, b2, D2, G2 = _operands(second)
    norm: dict[str, Any] = {}
    if isinstance(x, ProducerOutput):
        changed = x.changed()
        x, norm = x.norm_arguments() if changed is None else (changed, {})
    return tt_mlp(x, W1, b1, D1, G1, W2, b2, D2, G2, **norm, approximate=approximation(gelu) or "none")


def _operands(layer: EfftLinear) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return W, b, D and G of an adapted layer."""
    D, G = layer.factors.down_up(layer.binding)
    return stored_in(layer, "weight"), layer._parameters.get("bias"), D, G
