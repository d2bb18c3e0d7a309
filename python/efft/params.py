"""Count and print the trainable parameters of a model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from efft.adapting import extras
from efft.adapting.inject import Adapter
from efft.adapting.sharding import full_shape
from efft.adapting.wrappers import unwrap
from efft.planning.plan import Plan


@dataclass(frozen=True)
class ParameterCount:
    """Hold the numbers of parameters of an adapted model. Printing the object gives a table.

    Attributes:
        groups: the number of parameters of each group of factors. Shared parameters count once.
        head: the number of parameters that are trained in addition to the factors and ``extras``.
        backbone: the number of parameters of the base model without its head. It includes ``extras``.
        extras: the number of biases and norm parameters of the backbone that are trained.
    """

    groups: dict[str, int]
    head: int
    backbone: int
    extras: int = 0

    @property
    def factors(self) -> int:
        """The number of parameters of all factors together."""
        return sum(self.groups.values())

    def __str__(self) -> str:
        rows = [
            *self.groups.items(),
            ("all factors", self.factors),
            *([("biases and norms", self.extras)] if self.extras else []),
            ("head", self.head),
            ("backbone", self.backbone),
        ]
        width = max(len(name) for name, _ in rows)
        shares = [f"{100 * n / self.backbone:8.3f} %" if self.backbone else f"{'-':>10}" for _, n in rows]
        lines = [f"{name:<{width}}  {n:>13,}  {share}" for (name, n), share in zip(rows, shares, strict=True)]
        return "\n".join([f"{'':<{width}}  {'parameters':>13}  {'of backbone':>10}", *lines])


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the parameters of a model. If it is not adapted, all its trainable parameters count as head."""
    model = unwrap(model)
    adapter = getattr(model, "efft", None)
    groups = {}
    if isinstance(adapter, Adapter):
        groups = {name: sum(full_shape(p).numel() for p in factors.parameters()) for name, factors in adapter.items()}
    factors = {id(p) for p in adapter.parameters()} if isinstance(adapter, Adapter) else set()
    others = [p for p in model.parameters() if id(p) not in factors]
    names = adapter.extras if isinstance(adapter, Adapter) else []
    trained = {id(p): full_shape(p).numel() for p in extras.parameters_of(model, names).values()}
    head = sum(full_shape(p).numel() for p in others if p.requires_grad and id(p) not in trained)
    backbone = sum(full_shape(p).numel() for p in others) - head
    return ParameterCount(groups, head, backbone, sum(trained.values()))


def count_plan(model: nn.Module, plan: Plan) -> ParameterCount:
    """Count the parameters that ``model`` would have after applying ``plan``. The model may be on the meta device."""
    head = {id(p): p.numel() for name in plan.head for p in model.get_submodule(name).parameters()}
    total = sum(p.numel() for p in model.parameters())
    n_head = sum(head.values())
    groups = {g.name: g.n_parameters for g in plan.groups}
    return ParameterCount(groups, n_head, total - n_head, sum(plan.extras.values()))


def print_trainable_parameters(model: nn.Module) -> None:
    """Print a table of the numbers of parameters, and the line that ``peft`` prints."""
    model = unwrap(model)
    if not isinstance(getattr(model, "efft", None), Adapter):
        print(f"this {type(model).__name__} is not adapted: everything that requires a gradient counts as head")
    count = count_parameters(model)
    trainable, everything = count.factors + count.head + count.extras, count.factors + count.head + count.backbone
    print(count)
    print(
        f"trainable params: {trainable:,d} || all params: {everything:,d} || "
        f"trainable%: {100 * trainable / max(everything, 1):.4f}"
    )
