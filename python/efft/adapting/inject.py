"""Adapt a model in place, restore it, and disable its update. Freeze a model without an adapter for a linear probe."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from efft.adapting import buffers, extras
from efft.adapting.adapter import Adapter as Adapter
from efft.adapting.adapter import adapted_layers as adapted_layers
from efft.adapting.adapter import adapter_of as adapter_of
from efft.adapting.adapter import check_not_aside, prepare, present_layers, release
from efft.adapting.adapter import named_factors as named_factors
from efft.adapting.heads import find_head, is_language_model
from efft.adapting.loading import check_base_known, hooks_for
from efft.adapting.offload import Aside, device_of, follow, hooks_aside
from efft.adapting.optimizing import watch_optimizers
from efft.adapting.placing import place
from efft.adapting.sharding import check_whole
from efft.adapting.wrappers import check_unwrapped, unwrap
from efft.config import AdapterConfig
from efft.methods.efft import EfftConfig
from efft.planning.plan import Plan, make_plan, warn_of_untouched
from efft.saving.stored import check_stored
from efft_kernels import FactorBank
from efft_kernels.nn.adapt import restore
from efft_kernels.nn.frozen import FrozenLayer, is_plain
from efft_kernels.nn.linear import AdaptedLayer
from efft_kernels.nn.mlp import unfuse_mlp
from efft_kernels.nn.producers import unfuse_producer


def apply(model: nn.Module, config: AdapterConfig | None = None) -> nn.Module:
    """Adapt ``model`` in place: the selected weights get an update, and everything except factors and head is frozen.

    Biases and normalization layers are also trained if ``config`` selects them (``bias``, ``norms``).

    If the model calls a layer (linear, convolution, embedding), an adapted layer such as ``EfftLinear`` replaces it. A
    module that reads its own parameters is not replaced, and the parameters that it reads include the update.

    Only the new submodule ``model.efft`` owns the factors. The names of the base's parameters do not change. A forward
    pre-hook composes the updates of all layers together when the model starts to run. A layer that is called while the
    model does not run composes its own update. Every update is zero at first, because one of its factors is initialized
    with zeros.

    ``config`` is an :class:`EfftConfig` (the default) or the configuration of another method (:mod:`efft.methods`).

    Returns:
        The same ``model``.

    Raises:
        TypeError: the arguments are not a module and a configuration.
        ValueError: the model is already adapted, sharded or wrapped (by DDP or a similar wrapper), or ``config`` does
            not fit it. The model is then unchanged.
    """
    if not isinstance(model, nn.Module) or not isinstance(config, (AdapterConfig, type(None))):
        raise TypeError(
            f"expected efft.apply(model, EfftConfig(...)), got {type(model).__name__} and {type(config).__name__}"
        )
    config = copy.deepcopy(config) if config else EfftConfig()  # the caller may change its own object later
    check_plain(model)
    check_whole(model, "apply")
    check_unwrapped(model, "apply")
    with hooks_aside(model):
        plan = make_plan(model, config, share_tied=True)
    warn_of_untouched(model, plan, config)
    _warn_of_tied_head(model, plan.head)
    if config.head is None and not plan.head and not is_language_model(model):
        warnings.warn(
            f"found no head in this {type(model).__name__}, so nothing but the factors is trained: name the "
            "modules to train with head=[...], or pass head=[] if there are none",
            stacklevel=2,
        )
    return apply_plan(model, config, plan)


def apply_plan(model: nn.Module, config: AdapterConfig, plan: Plan) -> nn.Module:
    """Adapt ``model`` by a plan, as :func:`apply` does."""
    with hooks_aside(model) as aside:
        _check_trainable(model, plan.head, aside)
        _check_present(model, plan.extras, aside)
        _adapt(model, config, plan, aside)
    return model


def _adapt(model: nn.Module, config: AdapterConfig, plan: Plan, aside: Aside) -> None:
    requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    banks = _build_banks(model, config, plan, aside)  # before any layer changes, because this may fail
    sites = {name: (banks[group.name], site) for group in plan.groups for name, site in group.sites.items()}
    weights = {name: (plan.weights[name], *sites[plan.tied.get(name, name)]) for name in plan.in_order(model)}
    adapter = Adapter(banks, config, plan.head)
    adapter._base_buffers = buffers.snapshot(model, plan.head)
    adapter._still = buffers.statistics(model, plan.head) if config.freeze_statistics else []
    adapter._requires_grad = requires_grad
    adapter.extras, adapter._base_extras = list(plan.extras), extras.snapshot(model, plan.extras)
    before = {name: model.get_submodule(weight.module) for name, (weight, _, _) in weights.items()}
    updates = place(model, weights, config)
    stand_ins = {name: layer for name, layer in updates.items() if isinstance(layer, AdaptedLayer)}
    adapter._originals = {name: before[name] for name in stand_ins}
    follow(aside, {before[name]: layer for name, layer in stand_ins.items()})
    adapter.train(model.training)
    for name, first in plan.tied.items():
        updates[name].share(updates[first])
    config.settle(plan.groups, banks)
    adapter.layers = list(weights)
    adapter.plan = [group.to_dict() for group in plan.groups]
    _freeze_all_but(model, plan.head)
    for parameter in extras.parameters_of(model, plan.extras).values():
        parameter.requires_grad_(True)
    model.efft = adapter
    adapter._hooks = [
        model.register_forward_pre_hook(prepare),
        model.register_forward_hook(release, always_call=True),
        *hooks_for(model),
    ]
    if getattr(config, "rates", {}):
        adapter._watch = watch_optimizers
        watch_optimizers(model)


def _build_banks(model: nn.Module, config: AdapterConfig, plan: Plan, aside: Aside) -> dict[str, FactorBank]:
    banks: dict[str, FactorBank] = {}
    for group in plan.groups:
        owners = {name: (model.get_submodule(w.module), w.parameter) for name, w in plan.weights_of(group).items()}
        module, parameter = next(iter(owners.values()))
        weight = module._parameters[parameter]
        assert weight is not None
        device = device_of(aside, owners)
        try:
            banks[group.name] = group.build(device, torch.promote_types(weight.dtype, torch.float32))
        except NotImplementedError:  # weights on the meta device cannot be read
            if not weight.is_meta or device.type == "meta":
                raise
            raise ValueError(
                f"{config.method} makes its factors from the weights of {', '.join(group.sites)}, which are offloaded: "
                "load the model without offloading, or use another method"
            ) from None
    return banks


def remove(model: nn.Module) -> nn.Module:
    """Undo :func:`apply`.

    The original layers are restored, and so are the exact values of the buffers, biases and norms that training
    changed. Parameters that required gradients before :func:`apply` require gradients again. The head keeps its trained
    values. A merged model is unmerged first.

    Returns:
        The same ``model``.

    Raises:
        ValueError: the model is not adapted or is sharded, a ``forward`` was set on an adapted layer itself, an adapted
            layer computes its weight from other tensors, or the base's values of trained biases, norms or buffers are
            not known (because the model was on the meta device when it was adapted, or has loaded the state dict of a
            model with another base).
        RuntimeError: the model is within a block of :func:`disabled` that has replaced biases, norms or buffers, or it
            has lost an adapted layer (:func:`adapted_layers`). Nothing is changed.
    """
    adapter = adapter_of(model)
    check_not_aside(adapter, "remove")
    check_whole(model, "remove")
    layers = adapted_layers(model)
    check_stored(layers, "remove")
    check_base_known(model, adapter)
    with hooks_aside(model) as aside:
        put_in = {n: u for n, u in layers.items() if isinstance(u, AdaptedLayer)}
        changed = [name for name, layer in put_in.items() if "forward" in layer.__dict__]
        if changed:
            raise ValueError(
                f"a forward was set on {', '.join(map(repr, changed))} after efft.apply; undo that before efft.remove"
            )
        originals: dict[nn.Module, nn.Module] = {layer: adapter._originals[name] for name, layer in put_in.items()}
        restore(model, originals)
        follow(aside, originals)
    for module in model.modules():
        unfuse_mlp(module)
        unfuse_producer(module)
    for hook in adapter._hooks:
        hook.remove()
    buffers.put_back(model, adapter.head, adapter._base_buffers)
    extras.put_back(model, adapter._base_extras)
    for module in adapter._still:
        module.training = model.training
    del model.efft
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(adapter._requires_grad.get(name, parameter.requires_grad))
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Compute without the update within the ``with`` block, exactly as the base model does, but with the trained head.

    Within the block, a merged update is removed from the weights, and the buffers, biases and norms that training
    changed have the values of the base model. If there are such values, operations that need the trained values, such
    as saving, raise RuntimeError within the block. ``model`` may be wrapped by DDP or a similar wrapper.

    Raises:
        ValueError: the model is not adapted; biases or norms are trained, and DeepSpeed's ZeRO-3 manages them; or the
            base's values of biases, norms or buffers are not known (see :func:`remove`).
        RuntimeError: the model has lost an adapted layer (:func:`adapted_layers`).
    """
    wrapper, model = model, unwrap(model)
    adapter = adapter_of(model)
    merged = [update for update in adapted_layers(model).values() if update.merged]
    check_base_known(model, adapter)
    for update in merged:
        update.unmerge()
    before, aside = adapter.enabled, adapter._aside
    _enable(model, adapter, False)
    try:
        with (
            buffers.as_in_base(model, adapter.head, adapter._base_buffers) as replaced,
            extras.as_in_base(model, adapter._base_extras),
        ):
            adapter._aside = aside or replaced or bool(adapter.extras)
            yield wrapper
    finally:
        adapter._aside = aside
        if getattr(model, "efft", None) is adapter:  # the adapter was not removed in the block
            _enable(model, adapter, before)
            for update in merged:
                update.enabled = True
                update.merge(dequantize=True)


def freeze_backbone(model: nn.Module, head: list[str] | None = None) -> list[str]:
    """Freeze everything except the head, for a linear probe, and return the names of the head's modules.

    The head consists of the modules with the names ``head``. If ``head`` is None, the library finds it
    (:func:`efft.adapting.heads.find_head`).

    Raises:
        ValueError: the model has no head, or the weights of the head are offloaded or quantized.
    """
    names = find_head(model, head)
    with hooks_aside(model) as aside:
        _check_trainable(model, names, aside)
    if not names:
        raise ValueError(
            f"found no classifier in this {type(model).__name__}: create it with num_classes=..., or pass head=[names]"
        )
    _freeze_all_but(model, names)
    return names


def check_plain(model: nn.Module) -> None:
    """Check that ``model`` can be adapted.

    Raises:
        ValueError: the model or a module inside it is already adapted, or the model has its own attribute ``efft``.
    """
    if isinstance(getattr(model, "efft", None), Adapter):
        raise ValueError("this model is adapted already; call efft.remove(model) first to adapt it differently")
    inner = next((name for name, module in model.named_modules() if isinstance(module, (Adapter, FrozenLayer))), None)
    if inner is not None:
        raise ValueError(
            f"{inner!r} in this {type(model).__name__} is adapted already: call efft.remove on the model inside first"
        )
    if hasattr(model, "efft"):
        raise ValueError(f"this {type(model).__name__} has an attribute 'efft' of its own, which the adapter needs")


def _check_trainable(model: nn.Module, head: list[str], aside: Aside) -> None:
    for name in head:
        for parameter in model.get_submodule(name).parameters():
            if parameter.is_meta and any(m in aside for m in model.get_submodule(name).modules()):
                raise ValueError(
                    f"the head {name!r} is to be trained, but its weights are offloaded: keep it on the device (with "
                    "device_map), or pass head=[] to train only the factors"
                )
            if not is_plain(parameter):
                raise ValueError(
                    f"the head {name!r} is to be trained, but has a {type(parameter).__name__} for a weight: exclude "
                    "it from quantization, or pass head=[] to train only the factors"
                )


def _warn_of_tied_head(model: nn.Module, head: list[str]) -> None:
    """Warn if a module outside the head shares a parameter with the head."""
    inside = {id(module) for name in head for module in model.get_submodule(name).modules()}
    of_head: dict[int, str] = {}
    others: dict[int, str] = {}
    for prefix, module in model.named_modules() if head else ():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                (of_head if id(module) in inside else others).setdefault(id(parameter), f"{prefix}.{name}".lstrip("."))
    tied = next((key for key in of_head if key in others), None)
    if tied is not None:
        warnings.warn(
            f"{of_head[tied]!r} of the head and {others[tied]!r} are one parameter, so training the head changes the "
            "backbone too, and neither efft.remove nor efft.disabled restores this parameter: give the head its own "
            "one (layer.weight = nn.Parameter(layer.weight.detach().clone())), or leave it out of the head (head=[])",
            stacklevel=3,
        )


def _check_present(model: nn.Module, names: Iterable[str], aside: Aside) -> None:
    for name, parameter in extras.parameters_of(model, names).items():
        if parameter.is_meta and model.get_submodule(name.rpartition(".")[0]) in aside:
            raise ValueError(
                f"{name!r} is to be trained (bias, norms), but its module is offloaded: keep it on the device (with "
                "device_map), or use bias='none' and norms=False"
            )


def _enable(model: nn.Module, adapter: Adapter, enabled: bool) -> None:
    adapter.enabled = enabled
    for layer in present_layers(model).values():
        layer.enabled = enabled


def _freeze_all_but(model: nn.Module, head: Iterable[str]) -> None:
    model.requires_grad_(False)
    for name in head:
        model.get_submodule(name).requires_grad_(True)
