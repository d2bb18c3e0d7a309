"""Adapt any weight of a model by its name, and put it back.

A layer that is called is replaced by an adapted one; a parameter that its module reads stays in the module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import nn

from efft_kernels.nn.adapted import AdaptedWeight
from efft_kernels.nn.bank import FactorBank
from efft_kernels.nn.conv import EfftConv1d, EfftConv2d, EfftConv3d
from efft_kernels.nn.experts import EXPERT_VIEWS, ExpertWeight, cannot_adapt_experts
from efft_kernels.nn.factors import TTFactors
from efft_kernels.nn.frozen import is_conv1d, share_attributes
from efft_kernels.nn.linear import AdaptedLayer, EfftLinear
from efft_kernels.nn.parameter import (
    AdaptedModule,
    AdaptedParameter,
    adapted_weights_of,
    become_adapted,
    cannot_adapt_parameter,
    put_update,
    restore_module,
)
from efft_kernels.nn.reads import reads_weight_of_children
from efft_kernels.nn.transposed import EfftConv1D, EfftEmbedding

Layer = TypeVar("Layer", bound=nn.Module)

_KINDS: tuple[type[AdaptedLayer], ...] = (EfftLinear, EfftConv1d, EfftConv2d, EfftConv3d, EfftEmbedding)


def layer_class(layer: nn.Module) -> type[AdaptedLayer] | None:
    """Return the class that stands in for layers of this kind, or None if there is none.

    The ``refusal`` of that class may still have a reason against this layer.
    """
    if is_conv1d(layer):
        return EfftConv1D
    return next((kind for kind in _KINDS if isinstance(layer, kind.adapts)), None)


def cannot_adapt(model: nn.Module, name: str, view: str = "linear") -> str | None:
    """Return None if :func:`adapt` can adapt the layer or parameter ``name``, else the reason."""
    layer = _module_at(model, name)
    if layer is not None:
        kind = layer_class(layer)
        if kind is None:
            return (
                f"expected a linear layer, a convolution, a Conv1D of transformers or an embedding, got "
                f"{type(layer).__name__}; name its parameters"
            )
        return kind.refusal(layer)
    owner, _, parameter = name.rpartition(".")
    module = _module_at(model, owner)
    if module is None or not hasattr(module, parameter):
        return "there is no layer and no parameter of this name"
    if view in EXPERT_VIEWS:
        return cannot_adapt_experts(module, parameter)
    return cannot_adapt_parameter(module, parameter, view)


def adapt(
    model: nn.Module,
    sites: Mapping[str, tuple[FactorBank, Any]],
    *,
    views: Mapping[str, str] | None = None,
    kind: type[AdaptedLayer] = EfftLinear,
) -> dict[str, AdaptedWeight]:
    """Adapt weights of ``model``, in place.

    Args:
        model: the model.
        sites: a bank, and the part of it that the weight uses, by the name of a layer that is called
            (``"blocks.0.attn.qkv"``) or of a parameter of any other module (``"layers.0.attn.in_proj_weight"``).
        views: how the matrix lies in a parameter, if that is not ``"linear"``
            (:func:`efft_kernels.nn.parameter.adapt_parameter`). For a site of experts it is ``"experts"`` for matrices
            ``[experts, d_out, d_in]``, ``"experts transposed"`` for ``[experts, d_in, d_out]``.
        kind: the class that stands in for linear layers.

    Returns:
        By name, the stand-in of each layer, which is registered wherever the layer was, and each adapted parameter.

    Raises:
        TypeError: :func:`cannot_adapt` has a reason; nothing is changed.
        ValueError: sizes do not fit; no module is replaced.
    """
    views = views or {}
    for name in sites:
        reason = cannot_adapt(model, name, views.get(name, "linear"))
        if reason is not None:
            raise TypeError(f"{name}: {reason}")
    adapted: dict[str, AdaptedWeight] = {}
    stand_ins: dict[nn.Module, nn.Module] = {}
    for name, (factors, site) in sites.items():
        layer = _module_at(model, name)
        if layer is None:
            owner, _, parameter = name.rpartition(".")
            module, view = model.get_submodule(owner), views.get(name, "linear")
            if view in EXPERT_VIEWS:
                assert isinstance(factors, TTFactors)
                transposed = view == EXPERT_VIEWS[True]
                adapted[name] = ExpertWeight(module, parameter, factors, site, transposed=transposed)
            else:
                adapted[name] = AdaptedParameter(module, parameter, factors, site, view)
        else:
            chosen = layer_class(layer)
            assert chosen is not None
            adapted[name] = stand_ins[layer] = (kind if chosen is EfftLinear else chosen)(layer, factors, site)
    for weight in adapted.values():
        if isinstance(weight, AdaptedParameter):
            put_update(weight)
    replace_modules(model, stand_ins)
    mark_readers(model)
    return adapted


def mark_readers(model: nn.Module) -> dict[str, str]:
    """Prepare the modules of ``model`` that read weights of adapted layers instead of calling the layers.

    The ``weight`` of such a layer is its effective weight from then on, at any time. An ``nn.MultiheadAttention`` whose
    ``out_proj`` is adapted gets a forward that calls it, and an ``nn.TransformerEncoder`` uses no nested tensors while
    an update counts. Call this once all layers are replaced.

    Returns:
        The class of the module that reads it, by the name of each adapted layer that may be read.
    """
    readers = {}
    for name, layer, reader in read_layers(model, AdaptedLayer):
        layer.read, layer.reader = True, type(reader).__name__
        readers[name] = layer.reader
    for module in model.modules():
        if isinstance(module, AdaptedLayer):
            continue
        forward = type(module).forward
        if forward is nn.MultiheadAttention.forward and isinstance(module._modules["out_proj"], AdaptedLayer):
            become_adapted(module)
        if forward is nn.TransformerEncoder.forward and any(adapted_weights_of(m) for m in module.modules()):
            become_adapted(module)
    return readers


def read_layers(model: nn.Module, kind: type[Layer]) -> Iterator[tuple[str, Layer, nn.Module]]:
    """Yield (name, layer, reader) for each layer of class ``kind`` whose weight a module around it reads itself."""
    for path, module in model.named_modules():
        if isinstance(module, kind):
            continue
        for read in reads_weight_of_children(type(module)):  # type: ignore[arg-type]
            child, _, parameter = read.rpartition(".")
            layer = _module_at(module, child) if child and parameter == "weight" else None
            if isinstance(layer, kind):
                yield f"{path}.{child}".lstrip("."), layer, module


def restore(model: nn.Module, originals: Mapping[nn.Module, nn.Module]) -> None:
    """Undo every adaptation in ``model``, merged or not; parameters stay frozen.

    Args:
        originals: maps each stand-in to the layer that it stands in for, which gets its weight, hooks and mode back.
    """
    for stand_in, layer in originals.items():
        assert isinstance(stand_in, AdaptedLayer)
        stand_in.unmerge()
        for name, parameter in stand_in._parameters.items():
            layer.register_parameter(name, parameter)
        share_attributes(stand_in, layer)
    replace_modules(model, originals)
    for module in model.modules():
        if isinstance(module, AdaptedModule):
            restore_module(module)


def named_adapted_weights(model: nn.Module) -> Iterator[tuple[str, AdaptedWeight]]:
    """Yield (name, adapted weight) of each adapted layer and parameter of ``model``, each once."""
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLayer):
            yield path, module
        if isinstance(module, AdaptedModule):
            for name, parameter in module.adapted_parameters.items():
                yield f"{path}.{name}" if path else name, parameter


def state_name(name: str, weight: AdaptedWeight) -> str:
    """Return the name in a state dict of the weight that :func:`named_adapted_weights` calls ``name``."""
    return f"{name}.weight" if isinstance(weight, AdaptedLayer) else name


def _module_at(model: nn.Module, name: str) -> nn.Module | None:
    for part in name.split(".") if name else []:
        child = model._modules.get(part)
        if child is None:
            return None
        model = child
    return model


def replace_modules(model: nn.Module, new_of: Mapping[nn.Module, nn.Module]) -> None:
    """Put the new modules in wherever the old ones are registered or held in other attributes."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in new_of:
                setattr(parent, name, new_of[child])
        replace_in_attributes(parent, new_of)


def replace_in_attributes(parent: nn.Module, new_of: Mapping[nn.Module, nn.Module]) -> None:
    """Put the new modules in where ``parent`` holds old ones that are not registered.

    These may be in lists, tuples and dictionaries that its forward iterates over.
    """
    for name, value in list(parent.__dict__.items()):
        if name not in _REGISTRIES:
            held = _held(value, new_of)
            if held is not value:
                parent.__dict__[name] = held


_REGISTRIES = frozenset(vars(nn.Module()))


def _held(value: Any, new_of: Mapping[nn.Module, nn.Module], depth: int = 3) -> Any:
    """Return ``value`` with the new modules. Lists and dictionaries are changed in place: others may hold them too."""
    if isinstance(value, nn.Module):
        return new_of.get(value, value)
    if depth == 0:
        return value
    if type(value) is tuple:
        parts = tuple(_held(part, new_of, depth - 1) for part in value)
        return parts if any(new is not old for new, old in zip(parts, value, strict=True)) else value
    if type(value) in (list, dict):
        for key, part in list(enumerate(value) if type(value) is list else value.items()):
            held = _held(part, new_of, depth - 1)
            if held is not part:
                value[key] = held
    return value
