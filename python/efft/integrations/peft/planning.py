"""Plan an adapter under peft. The plan states which layers are adapted, and which of them share factors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import get_pattern_key
from torch import nn

from efft.adapting.heads import find_head
from efft.planning.extras import Extras, find_extras
from efft.planning.names import matcher
from efft.planning.plan import Plan, make_plan, warn_of_untouched
from efft.planning.structure import Weight, structure_of
from efft.planning.targets import by_structure, known_target

#: Stands for :class:`efft.integrations.peft.EfftPeftConfig`. The class is not imported, because its module imports this
#: module.
Config = Any


def plan_adapter(model: nn.Module, config: Config) -> Plan:
    """Plan the adapter of a model that peft has not wrapped yet.

    The function replaces ``config.target_modules="all-linear"`` by the names of the layers.

    Raises:
        ValueError: the configuration does not fit the model. The message gives the reason.
    """
    head = _head(model, config)
    if config.chosen_by_targets and config.exclude_modules is None and config.layers_to_transform is None:
        plan = make_plan(model, config.own(head=head))
        warn_of_untouched(model, plan, config)
        if not config.rank_pattern:
            return plan
        names = [name for group in plan.groups for name in group.sites]
    elif config.chosen_by_targets:
        plan = make_plan(model, config.own(head=head))
        names = [name for group in plan.groups for name in group.sites]
        # peft applies layers_to_transform only to endings of names in target_modules, not to whole names.
        found = _matcher(config, [name.rpartition(".")[2] for name in names], head)
        names = [name for name in names if found(name)]
    else:
        candidates: Iterable[str]
        if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
            every = _maybe_include_all_linear_layers(_settings(config, config.target_modules, head), model)
            config.target_modules = [name for name, _ in model.named_modules() if name in every.target_modules]
            # The list is complete, so every name in it matches. Comparing each name with each ending would be slow.
            candidates, found = config.target_modules, _matcher(config, ".*", head)
        else:
            candidates, found = dict(model.named_modules()), _matcher(config, config.target_modules, head)
        names = [name for name in candidates if name and found(name)]
        for pattern in config.exclude:
            excluded = set(filter(matcher(pattern), names))
            if not excluded:
                raise ValueError(f"exclude: {pattern!r} matches none of the layers that target_modules names")
            names = [name for name in names if name not in excluded]
        if config.modules_to_save is None:  # a classifier that is adapted is not a head
            head = [h for h in head if not any(f"{name}.".startswith(f"{h}.") for name in names)]
    if not names:
        raise NoMatchingPeftModuleError(
            f"no layer of this {type(model).__name__} is left to adapt. The settings are "
            f"target_modules={config.target_modules!r}, exclude_modules={config.exclude_modules!r}, "
            f"exclude={config.exclude!r}, layers_to_transform={config.layers_to_transform!r} and "
            f"layers_pattern={config.layers_pattern!r}. These modules are trained as a whole: {head}. As "
            "target_modules, give names of layers, their endings, a regular expression for whole names, or 'all-linear'"
        )
    return _plan_of(model, config, names, head)


def trained_norms(model: nn.Module, head: Iterable[str]) -> list[str]:
    """Return the names of the normalization layers outside the head.

    When a saved adapter is loaded, its head already contains the normalization layers that were trained. They are not
    returned again.

    Raises:
        ValueError: the model has no normalization layers with parameters.
    """
    trained = find_extras(model, Extras(norms=True), {}, [])
    inside = tuple(f"{name}." for name in head)
    return list(dict.fromkeys(name.rpartition(".")[0] for name in trained if not name.startswith(inside)))


def trained_beside(model: nn.Module, config: Config, plan: Plan) -> int:
    """Return the number of entries of all biases and norms that peft trains in addition to the factors and the head."""
    head = {id(p) for name in plan.head for p in model.get_submodule(name).parameters()}
    owners = {"none": [], "all": list(model.modules())}.get(config.bias, [model.get_submodule(n) for n in plan.weights])
    trained = [module._parameters.get("bias") for module in owners]
    for name in trained_norms(model, plan.head) if config.norms else ():
        trained += model.get_submodule(name).parameters()
    return sum({id(p): p.numel() for p in trained if p is not None and id(p) not in head}.values())


def exclusion(config: Config, name: str) -> Any:
    """Return the answer of a tuner to peft's question whether a layer is adapted, for a layer that is not.

    The answer is False, or an object of peft that is false as well. peft counts these objects to report that
    ``exclude_modules`` matched something.
    """
    return check_target_module_exists(_settings(config, ".*", []), name) and False


def _plan_of(model: nn.Module, config: Config, names: list[str], head: list[str]) -> Plan:
    """Return the plan for exactly the given layers. Layers of different ranks do not share factors."""
    weights = _weights(model, config, names, head)
    layers: dict[int, list[str]] = {}
    for name in names:
        rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.rank)
        layers.setdefault(rank if isinstance(rank, int) else 0, []).append(name)
    ends = {rank: "" if rank in (0, config.rank) else f"_r{rank}" for rank in layers}
    groups: list[Any] = []
    for rank, members in layers.items():
        changes: dict[str, Any] = {"rank": rank} if rank else {}
        if isinstance(config.scale, dict) and config.rank_pattern:
            own = {k: s for k, s in config.scale.items() if _end(k, ends.values()) == ends[rank]}
            changes["scale"] = {k.removesuffix(ends[rank]): s for k, s in own.items()}
        for group in _groups(model, config, {name: weights[name] for name in members}, changes):
            group.name += ends[rank]
            if config.trainable_scale == "global" and groups:
                group.trainable_scale = False  # the first group owns the scale
            groups.append(group)
    return Plan(groups, head, weights)


def _weights(model: nn.Module, config: Config, names: list[str], head: list[str]) -> dict[str, Weight]:
    structure = structure_of(model, head)
    for name in names:
        weight = structure.weights.get(name)
        if weight is None or weight.kind not in config.own().kinds:
            reason = structure.reasons.get(name, f"it is a {type(model.get_submodule(name)).__name__}")
            raise ValueError(
                f"layer {name!r} cannot be adapted: {reason}; leave it out of target_modules, or name it in "
                "exclude_modules"
            )
    return {name: structure.weights[name] for name in names}


def _groups(model: nn.Module, config: Config, weights: dict[str, Weight], changes: dict[str, Any]) -> Sequence[Any]:
    """Group the given layers as in the paper. If the configuration refuses that, group the layers by shape."""
    try:
        own = config.own(targets=list(weights), **changes)
        return own.groups(model, [known_target(weight) for weight in weights.values()])
    except ValueError:
        return config.own(targets="all", **changes).groups(model, by_structure(model, weights))


def _end(name: str, ends: Iterable[str]) -> str:
    """Return the ending that the name of a group has, or an empty string if it has none of ``ends``."""
    return next((end for end in ends if end and name.endswith(end)), "")


def _head(model: nn.Module, config: Config) -> list[str]:
    """Return the names of the modules that are trained as a whole.

    As in peft, ``modules_to_save`` contains endings of names. For some tasks peft adds the usual classifiers to it.
    """
    if config.modules_to_save is None:
        return find_head(model, None)
    ends = tuple(config.modules_to_save)
    return [name for name, _ in model.named_modules() if name.endswith(ends)] if ends else []


def _settings(config: Config, target_modules: Any, head: list[str]) -> SimpleNamespace:
    """Return the settings that peft's own matching rules read."""
    return SimpleNamespace(
        target_modules=target_modules,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        modules_to_save=[re.escape(name) for name in head],
        target_parameters=None,
        task_type=config.task_type,
    )


def _matcher(config: Config, target_modules: Any, head: list[str]) -> Callable[[str], bool]:
    """Return a function that checks whether peft's rules select a name."""
    settings = _settings(config, target_modules, head if config.modules_to_save is not None else [])
    return lambda name: bool(check_target_module_exists(settings, name))
