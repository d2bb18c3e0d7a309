"""Sort the trained parameters of a model into groups for an optimizer."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from efft.adapting import extras
from efft.adapting.adapter import Adapter, adapter_of, check_not_aside
from efft.adapting.wrappers import unwrap
from efft.config import check_rates
from efft.planning.extras import is_name_of_bias, is_norm


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 1e-4,
    head_lr: float | None = None,
    scale_lr: float | None = None,
    rates: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer, one per kind of trained parameters.

    The kinds are ``factors``, ``head``, ``scales``, ``diagonals`` (of ``layer_scale``), ``biases`` and ``norms``. The
    group ``head`` also contains all trained parameters that belong to no other kind. Factors with the name C are
    ``cores``, and all other factors are ``sides``. If ``rates`` or the adapter's configuration sets different rates for
    these two kinds, they replace ``factors``.

    As in the paper's recipe, weight decay acts only on factors and head. For a model without factors (a linear probe),
    all trained parameters are in ``head``, and a UserWarning is issued if nothing in the model is frozen. Empty groups
    are left out. A UserWarning is issued if rounding to the dtype of the parameters of a kind would undo a step of the
    size of the learning rate in most of their entries.

    Args:
        model: a model that :func:`apply`, or peft with an ``EfftPeftConfig``, has adapted. It may also be a module that
            contains such models, such as the wrapper of DDP, a moving average or a ``LightningModule``.
        lr: the learning rate of every kind for which no other rate is set.
        weight_decay: the weight decay of factors and head.
        head_lr, scale_lr: the learning rates of head and scales. By default, ``head_lr`` is ``lr`` and ``scale_lr`` is
            10 times ``lr``. One step of Adam changes a scale by about the fraction ``scale_lr`` of its value. With
            ``lr=1e-3``, this is 1 %, so a scale can double in 70 steps.
        rates: maps kinds to learning rates as multiples of ``lr``, such as ``{"cores": 3, "biases": 3}``. The kinds are
            ``sides``, ``cores``, ``diagonals``, ``biases``, ``norms``, ``head`` and ``scales``. Kinds that are missing
            have the rates of the adapter's configuration (:attr:`EfftConfig.rates`).

    Raises:
        ValueError: a rate is not a positive number, a kind is unknown, ``rates`` and ``head_lr`` or ``scale_lr`` set
            the same rate, or the active adapters of peft or the models inside ``model`` have different rates.
        RuntimeError: the model is within a block of :func:`efft.disabled` that has replaced biases, norms or buffers.
    """
    _check_rates(rates or {}, head_lr, scale_lr)
    model = unwrap(model)
    adapted = _adapted(model)
    if adapted is None and all(p.requires_grad for p in model.parameters()):
        warnings.warn(
            f"this {type(model).__name__} is not adapted and nothing in it is frozen, so all of it will be trained: "
            "call efft.apply(model, ...) first (for full fine-tuning, pass model.parameters() to the optimizer)",
            stacklevel=2,
        )
    own = _by_kind(model, adapted) if adapted is not None else {}
    # The arguments rates, head_lr and scale_lr override the rates of the configuration.
    rates = {**(adapted.rates if adapted is not None else {}), **(rates or {})}
    known = {id(p) for parameters in own.values() for p in parameters}  # not by name: a compiled model adds _orig_mod
    own["head"] = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    if rates.get("sides", 1.0) == rates.get("cores", 1.0):
        # One group in the order of the model. Optimizer checkpoints of models without such rates have the same order.
        rates["factors"] = rates.get("sides", 1.0)
        together = {id(p) for kind in ("sides", "cores") for p in own.pop(kind, ())}
        own["factors"] = [p for p in model.parameters() if id(p) in together]
    absolute = {"head": head_lr, "scales": scale_lr}
    groups: list[dict[str, Any]] = []
    for kind in ("factors", "sides", "cores", "head", "scales", "diagonals", "biases", "norms"):
        rate = absolute.get(kind)
        groups.append(
            {
                "name": kind,
                "params": own.get(kind, []),
                "lr": lr * rates.get(kind, 10 if kind == "scales" else 1) if rate is None else rate,
                "weight_decay": weight_decay if kind in ("factors", "sides", "cores", "head") else 0.0,
            }
        )
    _warn_of_lost_steps(groups)
    return [group for group in groups if group["params"]]


def set_rates(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Multiply learning rates of an optimizer by the rates of the adapter's configuration.

    A group of the optimizer is split if its parameters have different rates. Call this function before a scheduler
    reads the groups. Do nothing if ``model`` is not adapted, or if its configuration has no rates.

    Raises:
        ValueError: the models inside ``model``, or the active adapters of peft, have different rates.
    """
    adapted = _adapted(unwrap(model))
    if adapted is None or not adapted.rates:
        return
    rates = _rates(model, adapted)
    for group in list(optimizer.param_groups):
        by_rate: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_rate.setdefault(rates.get(id(parameter), adapted.rates.get("head", 1.0)), []).append(parameter)
        parts = [{**group, "params": params, "lr": group["lr"] * rate} for rate, params in by_rate.items()]
        for i, part in enumerate(parts):
            if i == 0:
                group.update(part)
            else:
                optimizer.add_param_group(part)


def watch_optimizers(model: nn.Module) -> None:
    """Let the first step of an optimizer for ``model`` issue a UserWarning if it ignores the adapter's rates.

    An optimizer ignores them if parameters with different rates are in the same group and the group has no name. The
    groups of :func:`parameter_groups` have names, and its caller may have chosen other rates. The warning is issued
    once per model. A copy of an adapted model is another model, which :func:`efft.adapting.adapter.prepare` watches
    from its first pass with gradients on.
    """
    adapted = _adapted_or_none(model)
    if adapted is not None and adapted.rates:
        _hook_all_optimizers()
        _watched.add(model)


_watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_checked: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


@functools.cache
def _hook_all_optimizers() -> None:
    register_optimizer_step_pre_hook(_check_rates_of)


def _check_rates_of(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling() or optimizer in _checked:
        return
    _checked.add(optimizer)
    for model in list(_watched):
        adapted = _adapted_or_none(model)
        if adapted is None:
            continue
        rates = _rates(model, adapted)
        groups = [group["params"] for group in optimizer.param_groups if "name" not in group]
        if any(len({rates[id(p)] for p in parameters if id(p) in rates}) > 1 for parameters in groups):
            _watched.discard(model)
            warnings.warn(
                f"this {type(optimizer).__name__} has one learning rate for parameters of the adapter that should "
                f"have different rates ({dict(adapted.rates)}, as multiples of lr): create it from "
                "efft.parameter_groups(model, lr), or set rates={} in the configuration",
                stacklevel=3,
            )


def _adapted_or_none(model: nn.Module) -> _Adapted | None:
    """Return the trained parts as :func:`_adapted` does, or None if it raises an error.

    :func:`parameter_groups` reports these errors.
    """
    try:
        return _adapted(model)
    except (RuntimeError, ValueError):
        return None


@torch.no_grad()
def _warn_of_lost_steps(groups: Iterable[Mapping[str, Any]]) -> None:
    """Warn about each group in which rounding would undo a step of the size of the learning rate in most entries."""
    for group in groups:
        narrow = [p for p in group["params"] if group["lr"] and _is_narrow(p)]
        entries = sum(p.numel() for p in group["params"])
        lost = sum(int(((p + group["lr"] == p) & (p - group["lr"] == p)).sum()) for p in narrow)
        if 2 * lost > entries:
            kinds = " and ".join(sorted({str(p.dtype).removeprefix("torch.") for p in narrow}))
            warnings.warn(
                f"a step of the learning rate {group['lr']:g} would not change {lost:,} of the {entries:,} entries of "
                f"the {group['name']}, because {kinds} rounds it away: keep the parameters in float32 (model.float(), "
                "with autocast for speed), or raise their learning rate",
                stacklevel=3,
            )


def _is_narrow(parameter: nn.Parameter) -> bool:
    """Return whether the values of a parameter are present and have a floating-point format of 16 bits."""
    sharded = hasattr(parameter, "full_tensor") or parameter.numel() == 0  # ZeRO-3 leaves empty tensors
    return parameter.dtype in (torch.float16, torch.bfloat16) and not parameter.is_meta and not sharded


def _check_rates(rates: Mapping[str, float], head_lr: float | None, scale_lr: float | None) -> None:
    check_rates(rates, "rates")
    for kind, lr in (("head", head_lr), ("scales", scale_lr)):
        if kind in rates and lr is not None:
            name = {"head": "head_lr", "scales": "scale_lr"}[kind]
            raise ValueError(f"{name} and rates[{kind!r}] both set the rate of the {kind}: pass only one of them")


class _Adapted(NamedTuple):
    """The trained parts of an adapted model, except the head.

    Attributes:
        factors: the parameters of the banks, by name.
        extras: biases, and parameters of normalization layers.
        rates: learning rates by kind from the configuration.
    """

    factors: dict[str, nn.Parameter]
    extras: list[nn.Parameter]
    rates: Mapping[str, float]


def _adapted(model: nn.Module) -> _Adapted | None:
    """Return the trained parts of a model and of the models inside it, or None if none of them is adapted.

    Raises:
        ValueError: the models have different rates.
    """
    inside = {name: m for name, m in model.named_modules() if isinstance(m._modules.get("efft"), Adapter)}
    if not inside:
        tuner: Any = next((module for module in model.modules() if "efft_banks" in module._modules), None)
        return None if tuner is None else _adapted_by_peft(model, tuner)
    factors: dict[str, nn.Parameter] = {}
    trained: dict[int, nn.Parameter] = {}
    rates: list[Mapping[str, float]] = []
    for prefix, module in inside.items():
        adapter = adapter_of(module)
        check_not_aside(adapter, "parameter_groups")
        factors |= {f"{prefix}.{name}".lstrip("."): p for name, p in adapter.named_parameters()}
        trained |= {id(p): p for p in extras.parameters_of(module, adapter.extras).values()}
        rates.append(getattr(adapter.config, "rates", {}))
    if any(other != rates[0] for other in rates):
        raise ValueError(
            f"the adapted models {', '.join(map(repr, inside))} in this {type(model).__name__} have different rates "
            f"{rates}: call efft.parameter_groups for each of them"
        )
    return _Adapted(factors, list(trained.values()), rates[0])


def _adapted_by_peft(model: nn.Module, tuner: Any) -> _Adapted:
    """Return the trained parts of a model that peft adapted with the tuner ``tuner``.

    Raises:
        ValueError: the active adapters have different rates.
    """
    rates: list[Mapping[str, float]] = [tuner.peft_config[name].rates for name in tuner.active_adapters]
    if any(other != rates[0] for other in rates):
        raise ValueError(
            f"the active adapters {tuner.active_adapters} have different rates {rates}: activate only one of them"
        )
    factors = {name: p for name, p in tuner.efft_banks.named_parameters() if p.requires_grad}
    norms = [p for module in model.modules() if is_norm(module) for p in module._parameters.values() if p is not None]
    # All parameters of modules that peft trains completely belong to the head, except those of normalization layers.
    biases = [
        p
        for name, p in model.named_parameters()
        if is_name_of_bias(name.rpartition(".")[2]) and "modules_to_save" not in name.split(".")
    ]
    trained = {id(p): p for p in [*norms, *biases] if p.requires_grad}
    return _Adapted(factors, list(trained.values()), rates[0] if rates else {})


def _rates(model: nn.Module, adapted: _Adapted) -> dict[int, float]:
    """Return the rate in the configuration of each trained parameter outside the head, by its ``id``."""
    return {id(p): adapted.rates.get(kind, 1.0) for kind, ps in _by_kind(model, adapted).items() for p in ps}


def _by_kind(model: nn.Module, adapted: _Adapted) -> dict[str, list[nn.Parameter]]:
    """Return the trained parameters outside the head, by kind. A shared parameter is included once."""
    kinds: dict[str, list[nn.Parameter]] = {}
    for name, parameter in adapted.factors.items():
        last = name.rpartition(".")[2]
        kind = {"log_scale": "scales", "C": "cores", "a": "diagonals", "b": "diagonals"}.get(last, "sides")
        kinds.setdefault(kind, []).append(parameter)
    norms = {id(p) for module in model.modules() if is_norm(module) for p in module._parameters.values()}
    for parameter in adapted.extras:
        kinds.setdefault("norms" if id(parameter) in norms else "biases", []).append(parameter)
    return kinds
