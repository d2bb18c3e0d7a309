"""Add updates to parameters that a module reads in its own forward method: see :func:`adapt_parameter`.

No adapted layer can replace a module that has its own forward method (a weight-standardized convolution, an attention
with packed projections). Such a module stays in the model and only its class changes. The new class has the same name.
In it, the parameter is a property that returns the *effective weight*, the stored parameter plus the update
(:mod:`efft_kernels.nn.effective`). Names in the state dict, hooks and hook handles stay the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from efft_kernels.nn.adapted import VIEWS, AdaptedWeight, matrix_sizes
from efft_kernels.nn.bank import FactorBank
from efft_kernels.nn.effective import effective_property
from efft_kernels.nn.frozen import FrozenLayer, is_plain, stored_in


class AdaptedParameter(AdaptedWeight):
    """Adapt one parameter of a module. The ``adapted_parameters`` of the module contain this object.

    Args:
        module: the module that owns the parameter.
        name: the name of the parameter.
        factors: the bank.
        site: the part of the bank that the parameter uses.
        view: how the matrix is stored in the parameter (see :func:`adapt_parameter`).

    Raises:
        ValueError: the sizes of the site and the parameter differ.
    """

    def __init__(self, module: nn.Module, name: str, factors: FactorBank, site: Any, view: str) -> None:
        self.module, self.name, self.view = module, name, view
        self._check_sizes(factors, site, self._sizes(), f"{name} of {type(module).__name__}")
        self.factors, self.site, self.binding = factors, site, factors.bind(site)
        self.enabled = True

    def _sizes(self) -> tuple[int, int]:
        return matrix_sizes(self.stored, self.view)

    @property
    def stored(self) -> Tensor:
        return stored_in(self.module, self.name)

    def store(self, weight: nn.Parameter) -> None:
        self.module.register_parameter(self.name, weight)

    @property
    def weight(self) -> Tensor:
        """The stored parameter."""
        return self.stored

    @property
    def base_weight(self) -> Tensor | None:
        """The parameter before the update was merged into it. It is a buffer, so that it moves with the module."""
        return self.module._buffers.get(self._base_name)

    @base_weight.setter
    def base_weight(self, weight: Tensor | None) -> None:
        if weight is None:
            delattr(self.module, self._base_name)
        else:
            self.module.register_buffer(self._base_name, weight, persistent=False)

    @property
    def _base_name(self) -> str:
        return f"base_{self.name}"


class AdaptedModule:
    """Serve as an additional base class of a module while its parameters are adapted (:func:`adapt_parameter`)."""

    adapted_parameters: dict[str, AdaptedParameter]
    prefix: ClassVar[str] = ""
    """The name of the new class is this prefix followed by the name of the module's original class."""

    def extra_repr(self) -> str:
        own: str = super().extra_repr()  # type: ignore[misc]
        return ", ".join([own] * bool(own) + [f"{n}: {p.describe()}" for n, p in self.adapted_parameters.items()])

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return _empty, (_original(type(self)), tuple(self.adapted_parameters)), *reduced[2:]


def adapted_weights_of(module: object) -> list[AdaptedWeight]:
    """Return the adapted weights of ``module`` itself: the weight of an adapted layer, or the adapted parameters."""
    if isinstance(module, AdaptedWeight):
        return [module]
    return [*module.adapted_parameters.values()] if isinstance(module, AdaptedModule) else []


_own_forwards: dict[Callable[..., Any], type[AdaptedModule]] = {}
_classes: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def runs_for(forward: Callable[..., Any]) -> Callable[[type[AdaptedModule]], type[AdaptedModule]]:
    """Decorate a subclass of :class:`AdaptedModule` whose forward method replaces the method ``forward``.

    Adapted modules whose forward method is ``forward`` then inherit from the subclass.
    """

    def register(kind: type[AdaptedModule]) -> type[AdaptedModule]:
        _own_forwards[forward] = kind
        return kind

    return register


def _class_of(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Return the class for modules of class ``base`` whose parameters ``names`` are adapted."""
    if (base, names) not in _classes:
        parts: dict[str, Any] = {name: effective_property(name, _owner(name)) for name in names}
        parts |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        parts |= {
            "_adapted_base": base,
            "__jit_unused_properties__": [*getattr(base, "__jit_unused_properties__", ()), *names],
        }
        kind = _own_forwards.get(base.forward, AdaptedModule)
        _classes[base, names] = type(kind.prefix + base.__name__, (kind, base), parts)
    return _classes[base, names]


def _owner(name: str) -> Callable[[Any], AdaptedWeight | None]:
    return lambda module: module.adapted_parameters.get(name)


def _original(kind: type) -> type[nn.Module]:
    return vars(kind).get("_adapted_base", kind)  # vars excludes the attribute that another subclass would inherit


def _empty(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    kind = _class_of(base, names)
    return kind.__new__(kind)


def become_adapted(module: nn.Module) -> None:
    """Change the class of a module to replace its forward method, even if it has no adapted parameters."""
    _take_class(module, getattr(module, "adapted_parameters", {}))


def _take_class(module: nn.Module, adapted: dict[str, AdaptedParameter]) -> None:
    module.__dict__["adapted_parameters"] = adapted
    module.__class__ = _class_of(_original(type(module)), tuple(adapted))


def adapt_parameter(
    module: nn.Module, name: str, factors: FactorBank, site: Any, view: str = "linear"
) -> AdaptedParameter:
    """Freeze the parameter ``name`` of ``module`` and add the update of ``site`` to it.

    Code that reads ``module.<name>`` then gets the effective weight. ``parameters()``, the state dict, ``.to()`` and
    optimizers still use the stored parameter. The effective weight becomes a dense tensor when its values are used,
    except in ``F.linear`` and in some batched products (:mod:`efft_kernels.nn.effective`).

    Args:
        module: the module that owns the parameter.
        name: the name of the parameter, which has two or more dimensions.
        factors: the bank.
        site: the part of the bank that the parameter uses.
        view: how the matrix is stored in the parameter: ``"linear"`` ``[d_out, d_in]``, ``"transposed"``
            ``[d_in, d_out]``, ``"convolution"`` ``[d_out, ...]`` (all dimensions except the first form d_in), or
            ``"stacked"`` ``[..., d_in]`` (all dimensions except the last form d_out).

    Returns:
        The adapted parameter, which is also in ``module.adapted_parameters``.

    Raises:
        TypeError: the parameter cannot be adapted (:func:`cannot_adapt_parameter` returns the reason).
        ValueError: the sizes of the site and the parameter differ, or the view is unknown.
    """
    if view not in VIEWS:
        raise ValueError(f"view must be one of {', '.join(map(repr, VIEWS))}, got {view!r}")
    reason = cannot_adapt_parameter(module, name, view)
    if reason is not None:
        raise TypeError(f"{name} of {type(module).__name__}: {reason}")
    return put_update(AdaptedParameter(module, name, factors, site, view))


def put_update(parameter: AdaptedParameter) -> AdaptedParameter:
    """Register an adapted parameter with its module, which then reads the effective weight."""
    module = parameter.module
    module._parameters[parameter.name].requires_grad_(False)  # type: ignore[union-attr]
    adapted = getattr(module, "adapted_parameters", {})
    _take_class(module, {**adapted, parameter.name: parameter})
    return parameter


def restore_module(module: nn.Module) -> None:
    """Undo every :func:`adapt_parameter` call on ``module``, merged or not. Leave other modules unchanged.

    Raises:
        RuntimeError: the class of the module was changed again afterwards (by a parametrization or ``fully_shard``).
    """
    adapted: dict[str, AdaptedParameter] | None = getattr(module, "adapted_parameters", None)
    if adapted is None:
        return
    if _original(type(module)) is type(module):
        raise RuntimeError(f"a {type(module).__name__} got another class after it was adapted; undo that change first")
    for parameter in adapted.values():
        parameter.unmerge()
    module.__class__ = _original(type(module))
    del module.__dict__["adapted_parameters"]


def cannot_adapt_parameter(module: nn.Module, name: str, view: str = "linear") -> str | None:
    """Return None if an update can be added to the parameter ``name`` of ``module``, else the reason."""
    parameter: Any = module._parameters.get(name)
    if isinstance(module, FrozenLayer) or name in getattr(module, "adapted_parameters", {}):
        return "it is adapted already"
    if name in getattr(module, "parametrizations", {}):
        return "it is parametrized; remove the parametrization first"
    if parameter is None:
        return "there is no such parameter"
    if is_lazy(parameter):
        return "its shape is not known before the module's first call; run the model once first"
    if not is_plain(parameter):
        return f"it is a {type(parameter).__name__}, not a plain dense tensor, and cannot hold a sum with an update"
    if isinstance(module, torch.jit.ScriptModule):
        return "the module is a TorchScript module, which reads the parameter without Python"
    if isinstance(module, nn.RNNBase):
        return "torch's recurrent layers cannot be adapted: they read their weights from a list of their own"
    expected = "2" if view in ("linear", "transposed") else "2 or more"
    if parameter.dim() != 2 and (parameter.dim() < 2 or view not in ("convolution", "stacked")):
        return f"expected {expected} dimensions, got shape {list(parameter.shape)}"
    return None
