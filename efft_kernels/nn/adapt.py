"""Adapt weights of a model by name, and undo the adaptation.

To *adapt* a frozen weight means to add an update to it that a bank of factors provides (the module that owns the
trained factors of many layers). A *site* is the part of a bank that one weight uses. If the model calls a layer, an
adapted layer, the *stand-in*, replaces that layer. If a module reads a parameter in its own forward method, the
parameter stays in the module and the class of the module changes.
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
    """Return the class that replaces layers of this type, or None if no class does.

    The method ``refusal`` of the class may still return a reason why this layer cannot be replaced.
    """
    if is_conv1d(layer):
        return EfftConv1D
    return next((kind for kind in _KINDS if isinstance(layer, kind.adapts)), None)


def cannot_adapt(model: nn.Module, name: str, view: str = "linear") -> str | None:
    """Return None if :func:`adapt` can adapt the layer or parameter ``name`` with ``view``, else the reason."""
    layer = _module_at(model, name)
    if layer is not None:
        kind = layer_class(layer)
        if kind is None:
            return (
                f"expected a linear layer, a convolution, a Conv1D of transformers or an embedding, got "
                f"{type(layer).__name__}; name the parameters of this module instead"
            )
        return kind.refusal(layer)
    owner, _, parameter = name.rpartition(".")
    module = _module_at(model, owner)
    if module is None or not hasattr(module, parameter):
        return "the model has no layer and no parameter with this name"
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
    """Adapt weights of ``model`` in place.

    Args:
        model: the model.
        sites: maps the name of each weight to its bank and its site in the bank. The name is that of a layer that the
            model calls (``"blocks.0.attn.qkv"``), or that of a parameter of any other module
            (``"layers.0.attn.in_proj_weight"``).
        views: maps the names of parameters to views if the view is not ``"linear"``
            (:func:`efft_kernels.nn.parameter.adapt_parameter`). The view of an expert site is ``"experts"`` for
            matrices ``[experts, d_out, d_in]``, and ``"experts transposed"`` for ``[experts, d_in, d_out]``.
        kind: the class that replaces linear layers.

    Returns:
        The adapted weights by name: the stand-in of each layer, which is registered wherever the layer was, and each
        adapted parameter.

    Raises:
        TypeError: a weight cannot be adapted (:func:`cannot_adapt` returns the reason); nothing is changed.
        ValueError: the sizes of a site and its weight differ; no module is replaced.
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

    From then on, the ``weight`` of such a layer is the effective weight, which includes the update, even while the
    model is not running. An ``nn.MultiheadAttention`` with an adapted ``out_proj`` gets a forward method that calls
    ``out_proj``, and an ``nn.TransformerEncoder`` does not use nested tensors while an update is applied. Call this
    function after all layers are replaced.

    Returns:
        A dict from the name of each adapted layer whose weight may be read to the class name of the reading module.
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
    """Yield (name, layer, reader) for each layer of class ``kind`` whose weight an enclosing module reads directly."""
    for path, module in model.named_modules():
        if isinstance(module, kind):
            continue
        for read in reads_weight_of_children(type(module)):  # type: ignore[arg-type]
            child, _, parameter = read.rpartition(".")
            layer = _module_at(module, child) if child and parameter == "weight" else None
            if isinstance(layer, kind):
                yield f"{path}.{child}".lstrip("."), layer, module


def restore(model: nn.Module, originals: Mapping[nn.Module, nn.Module]) -> None:
    """Undo every adaptation in ``model``, merged or not. Parameters stay frozen.

    Args:
        originals: maps each stand-in to the layer that it replaced. The layer gets the parameters, the hooks, the mode
            and the other attributes of the stand-in.
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
    """Yield (name, adapted weight) once for each adapted layer and parameter of ``model``."""
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLayer):
            yield path, module
        if isinstance(module, AdaptedModule):
            for name, parameter in module.adapted_parameters.items():
                yield f"{path}.{name}" if path else name, parameter


def state_name(name: str, weight: AdaptedWeight) -> str:
    """Return the state dict's name for the weight that :func:`named_adapted_weights` yields as ``name``."""
    return f"{name}.weight" if isinstance(weight, AdaptedLayer) else name


def _module_at(model: nn.Module, name: str) -> nn.Module | None:
    for part in name.split(".") if name else []:
        child = model._modules.get(part)
        if child is None:
            return None
        model = child
    return model


def replace_modules(model: nn.Module, new_of: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules wherever modules of ``model`` register them or store them in other attributes.

    ``new_of`` maps old to new modules.
    """
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in new_of:
                setattr(parent, name, new_of[child])
        replace_in_attributes(parent, new_of)


def replace_in_attributes(parent: nn.Module, new_of: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules in attributes of ``parent`` that contain them without registering them.

    Such attributes may be lists, tuples and dictionaries over which the forward method of ``parent`` iterates.
    ``new_of`` maps old to new modules.
    """
    for name, value in list(parent.__dict__.items()):
        if name not in _REGISTRIES:
            held = _held(value, new_of)
            if held is not value:
                parent.__dict__[name] = held


_REGISTRIES = frozenset(vars(nn.Module()))


def _held(value: Any, new_of: Mapping[nn.Module, nn.Module], depth: int = 3) -> Any:
    """Return ``value`` with new modules instead of old ones, also inside containers that are nested up to ``depth``.

    Lists and dictionaries are changed in place, because other objects may refer to them.
    """
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
