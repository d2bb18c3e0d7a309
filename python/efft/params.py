"""Count trainable parameters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from efft.adapting.inject import Adapter
from efft.adapting.sharding import full_shape
from efft.adapting.wrappers import unwrap
from efft.planning.plan import Plan


@dataclass(frozen=True)
class ParameterCount:
    """Trainable parameters of an adapted model; printing it gives a table.

    Attributes:
        groups: the number of parameters of each group of factors; shared ones count once.
        head: the number of parameters that are trained beside the factors.
        backbone: the number of parameters of the base without its head.
    """

    groups: dict[str, int]
    head: int
    backbone: int

    @property
    def factors(self) -> int:
        """The number of parameters of all factors together."""
        return sum(self.groups.values())

    def __str__(self) -> str:
        rows = [
            *self.groups.items(),
            ("all factors", self.factors),
            ("head", self.head),
            ("backbone", self.backbone),
        ]
        width = max(len(name) for name, _ in rows)
        shares = [f"{100 * n / self.backbone:8.3f} %" if self.backbone else f"{'-':>10}" for _, n in rows]
        lines = [f"{name:<{width}}  {n:>13,}  {share}" for (name, n), share in zip(rows, shares, strict=True)]
        return "\n".join([f"{'':<{width}}  {'parameters':>13}  {'of backbone':>10}", *lines])


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count an adapted model's parameters; in any other model, everything trainable counts as head."""
    model = unwrap(model)
    adapter = getattr(model, "efft", None)
    groups = {}
    if isinstance(adapter, Adapter):
        groups = {name: sum(full_shape(p).numel() for p in factors.parameters()) for name, factors in adapter.items()}
    factors = {id(p) for p in adapter.parameters()} if isinstance(adapter, Adapter) else set()
    others = [p for p in model.parameters() if id(p) not in factors]
    head = sum(full_shape(p).numel() for p in others if p.requires_grad)
    return ParameterCount(groups, head, sum(full_shape(p).numel() for p in others) - head)


def count_plan(model: nn.Module, plan: Plan) -> ParameterCount:
    """Return what :func:`count_parameters` would after applying ``plan``, without applying it; meta models work too."""
    head = {id(p): p.numel() for name in plan.head for p in model.get_submodule(name).parameters()}
    total = sum(p.numel() for p in model.parameters())
    n_head = sum(head.values())
    return ParameterCount({g.name: g.n_parameters for g in plan.groups}, n_head, total - n_head)


def print_trainable_parameters(model: nn.Module) -> None:
    """Print the parameters of each group of factors, of head and backbone, and the line that ``peft`` prints."""
    model = unwrap(model)
    if not isinstance(getattr(model, "efft", None), Adapter):
        print(f"this {type(model).__name__} is not adapted: everything that requires a gradient counts as head")
    count = count_parameters(model)
    trainable = count.factors + count.head
    print(count)
    print(
        f"trainable params: {trainable:,d} || all params: {trainable + count.backbone:,d} || "
        f"trainable%: {100 * trainable / max(trainable + count.backbone, 1):.4f}"
    )
