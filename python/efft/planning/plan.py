"""Plan an adaptation. The plan states which weights share which factors, which weights are left out, and why.

A *block* is one of the repeated modules of a model, such as a transformer layer.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from efft.adapting.adapter import Adapter
from efft.adapting.heads import find_head
from efft.config import AdapterConfig, Group
from efft.methods.efft import EfftConfig
from efft.planning.extras import find_extras, known_extras
from efft.planning.structure import Weight, structure_of
from efft.planning.targets import Target, known_target, select

#: A warning is issued if more than this share of the weights in blocks is not adapted.
SILENT_SHARE = 0.01


@dataclass
class Plan:
    """Describe the changes that ``efft.apply`` would make to a model. Printing a plan shows a table.

    Attributes:
        groups: descriptions of the banks of factors (:class:`efft.config.Group`). The groups of EFFT also contain the
            sizes of their tensor trains.
        head: names of the modules that are trained in addition to the factors.
        weights: the adapted weights, by name.
        left_out: maps each parameter in the blocks that is not adapted to its number of entries, largest first.
        reasons: maps the names of weights that cannot be adapted to the reasons.
        in_blocks: number of entries of all weights in blocks.
        tied: maps each adapted layer that shares the weight of another layer to the name of the other layer. Both
            layers use the same update.
        between: maps each parameter between the blocks of a ViT or Swin to its number of entries. As in the paper,
            these parameters are not adapted.
        extras: maps the full name of each bias and norm that is trained in addition to factors and head to its number
            of entries.
    """

    groups: Sequence[Any]
    head: list[str]
    weights: dict[str, Weight]
    left_out: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    in_blocks: int = 0
    tied: dict[str, str] = field(default_factory=dict)
    between: dict[str, int] = field(default_factory=dict)
    extras: dict[str, int] = field(default_factory=dict)

    @property
    def untouched_share(self) -> float:
        """Share of the entries of all weights in blocks that is not adapted."""
        return sum(self.left_out.values()) / self.in_blocks if self.in_blocks else 0.0

    @property
    def n_parameters(self) -> int:
        """Number of trainable parameters of all factors."""
        return sum(group.n_parameters for group in self.groups)

    def weights_of(self, group: Group) -> dict[str, Weight]:
        """Return the weights that use a group's factors."""
        return {name: self.weights[name] for name in group.sites}

    def in_order(self, model: nn.Module) -> list[str]:
        """Return the names of the weights in the order of the model's modules."""
        place = {name: i for i, (name, _) in enumerate(model.named_modules())}
        return sorted(self.weights, key=lambda name: place[self.weights[name].module])

    def missing(self) -> str:
        """Describe the weights in blocks that are not adapted, by name and share; return "" if all are adapted."""
        if not self.left_out:
            return ""
        kinds: dict[str, list[str]] = {}
        for name in self.left_out:
            kinds.setdefault(_without_numbers(name), []).append(name)
        rows = []
        for kind, names in sorted(kinds.items(), key=lambda item: -sum(self.left_out[n] for n in item[1])):
            share = sum(self.left_out[n] for n in names) / self.in_blocks
            reason = next((r for n in names if (r := self._reason(n))), "")
            rows.append(f"{kind} ({len(names)}, {share:.1%})" + (f": {reason}" if reason else ""))
        more = f"; and {len(rows) - 8} more" if len(rows) > 8 else ""
        return "; ".join(rows[:8]) + more

    def _reason(self, parameter: str) -> str | None:
        return self.reasons.get(parameter) or self.reasons.get(parameter.rpartition(".")[0])

    def __str__(self) -> str:
        lines = [group.describe() for group in self.groups]
        lines.append(f"head: {', '.join(self.head) or 'none'}")
        if self.extras:
            names = Counter(map(_without_numbers, self.extras))
            listed = ", ".join(f"{name} ({n})" for name, n in names.items())
            lines.append(f"biases and norms: {sum(self.extras.values()):,} parameters: {listed}")
        if self.in_blocks:
            lines.append(f"adapted: {1 - self.untouched_share:.1%} of the weights in blocks")
        if self.left_out:
            lines.append(f"left out: {self.missing()}")
        if self.between:
            names = Counter(map(_without_numbers, self.between))
            listed = ", ".join(f"{name} ({n})" for name, n in names.items())
            lines.append(
                f"between the blocks, left alone as in the paper: {listed}, {sum(self.between.values()):,} entries"
            )
        return "\n".join(lines)


def _without_numbers(name: str) -> str:
    """Return the name with a star for every number. All blocks then have the same name for the same weight."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def inspect(model: nn.Module, config: AdapterConfig | None = None) -> Plan:
    """Return the plan of :func:`efft.apply` for ``config`` (default: :class:`EfftConfig`) without changing the model.

    ``model`` may be on the meta device. Printing the result shows the groups with their shapes and numbers of
    parameters, the head, and the weights of the repeated blocks that are left out and why.

    Raises:
        ValueError: same as for :func:`efft.apply`.
    """
    return make_plan(model, config or EfftConfig(), share_tied=True)


def make_plan(model: nn.Module, config: AdapterConfig, share_tied: bool = False) -> Plan:
    """Plan the adaptation of ``model``, which may be on the meta device.

    With ``share_tied``, layers that share one weight are adapted together. Otherwise they are not adapted.

    Raises:
        ValueError: the model lacks selected weights, or they cannot share a tensor train. The message names the weights
            and suggests a solution.
    """
    _check_not_compiled(model)
    head = find_head(model, config.head)
    structure = structure_of(model, head, share_tied)
    targets = select(model, structure, config.targets, config.exclude, config.kinds)
    groups = config.groups(model, targets)
    sizes = _blocks_of_roles(structure.sizes, targets)
    weights = {name: structure.weights[name] for group in groups for name in group.sites}
    others = (name for name, weight in structure.weights.items() if weight.kind not in config.kinds)
    reasons = {**structure.reasons, **dict.fromkeys(others, config.why_not)}
    unreached = config.unreached(targets, groups)
    reasons |= unreached
    untouched = structure.untouched({target.name for target in targets} - unreached.keys())
    left_out = {name: size for name, size in untouched.items() if name in sizes}
    ordered = dict(sorted(left_out.items(), key=lambda item: -item[1]))
    weights, tied = structure.with_tied(weights)
    between = {name: size for name, size in structure.sizes.items() if name not in sizes}
    extras = find_extras(model, config.extras, weights, head)
    return Plan(groups, head, weights, ordered, reasons, sum(sizes.values()), tied, between, extras)


def _check_not_compiled(model: nn.Module) -> None:
    if any("_orig_mod" in module._modules for module in model.modules()):
        raise ValueError("the model is compiled already: adapt it (or load the adapter) first, then torch.compile it")


def _blocks_of_roles(sizes: Mapping[str, int], targets: Sequence[Target]) -> dict[str, int]:
    """Return the parameters in the blocks whose roles are known, or all of ``sizes`` if no target has a role."""
    blocks = {target.block for target in targets if target.role != "linear"}
    if not blocks:
        return dict(sizes)
    return {name: size for name, size in sizes.items() if any(block in blocks for block in _prefixes(name))}


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def warn_of_untouched(model: nn.Module, plan: Plan, config: AdapterConfig) -> None:
    """Warn if ``targets="all"`` leaves out more than the share :data:`SILENT_SHARE` of the weights in blocks.

    For ``"all-linear"`` the warning is about linear weights that the method cannot adapt, such as those of experts.
    """
    if config.targets == "all-linear":
        left_out = {n: size for n, size in plan.left_out.items() if plan.reasons.get(n) == config.why_not}
        plan = replace(plan, left_out=left_out)
    if config.targets in ("all", "all-linear") and not config.exclude and plan.untouched_share > SILENT_SHARE:
        warnings.warn(
            f"{plan.untouched_share:.1%} of the weights in the blocks of this {type(model).__name__} stay untouched: "
            f"{plan.missing()}",
            stacklevel=3,
        )


def plan_of_file(
    model: nn.Module,
    config: AdapterConfig,
    saved: Sequence[Any],
    base: Mapping[str, Any],
    extras: Sequence[str] = (),
) -> Plan:
    """Return the plan that an adapter file holds, for ``model``.

    The file contains the exact names of the adapted weights. The patterns in its configuration are not used.

    Args:
        model: the model into which the adapter will be loaded.
        config: configuration from the file.
        saved: the ``to_dict`` of every group. The list is empty for files of the first format, which contain only
            names.
        base: description of the base model from the file.
        extras: names of the biases and norms that were trained in addition to factors and head.

    Raises:
        ValueError: the model lacks one of the weights or is compiled, or the plan is damaged.
    """
    _check_not_compiled(model)
    head = find_head(model, config.head)
    structure = structure_of(model, head, share_tied=True)

    def weight(name: str) -> Weight:
        found = structure.weights.get(name)
        if found is None:
            reason = structure.reasons.get(name)
            if reason is not None:
                raise ValueError(f"layer {name!r} cannot be adapted: {reason}")
            raise ValueError(
                f"it has no layer {name!r}, which the adapter changes (it was trained on a {base['architecture']})"
            )
        return found

    if not saved:
        targets = [known_target(weight(name)) for name in base["layers"]]
        # Files of the first format have no tied weights.
        weights = {t.name: t.weight for t in targets}
        return Plan(config.groups(model, targets), head, weights, extras=known_extras(model, extras, weights, head))
    groups: list[Any] = []
    found: dict[str, Weight] = {}
    for group in saved:
        members = {name: weight(name) for name in group["weights"]}
        groups.append(config.group_of_file(model, group, list(members.values())))
        found |= members
    found, tied = structure.with_tied(found)
    return Plan(groups, head, found, tied=tied, extras=known_extras(model, extras, found, head))


def check_saved_plan(saved: Any) -> None:
    """Raise ValueError if ``saved`` is not a list of groups with the keys that all methods need."""
    if not isinstance(saved, list):
        raise ValueError("'plan' must be a list of groups")
    nothing = Adapter({}, EfftConfig(), [])
    for group in saved:
        if not isinstance(group, dict) or not isinstance(group.get("name"), str):
            raise ValueError("every group of 'plan' must be an object with a name")
        if not group["name"].isidentifier() or hasattr(nothing, group["name"]):
            raise ValueError(f"'plan' has a group of the name {group['name'][:50]!r}, which a module cannot have")
        weights = group.get("weights")
        if not isinstance(weights, dict) or not weights or not all(isinstance(v, str) for v in weights.values()):
            raise ValueError("every group of 'plan' must name its weights")
    for names in ([group["name"] for group in saved], [name for group in saved for name in group["weights"]]):
        name, times = Counter(names).most_common(1)[0] if names else ("", 1)
        if times > 1:
            raise ValueError(f"'plan' has {name[:50]!r} {times} times")
