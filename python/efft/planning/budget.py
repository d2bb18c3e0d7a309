"""Choose the rank, and whether to train biases and norms, for a given number of parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from efft.adapting.heads import find_head
from efft.config import LARGEST_SIZE, AdapterConfig, is_size, quote
from efft.planning.extras import EXTRAS_OF_ANY_MODEL, Extras, find_extras
from efft.planning.structure import structure_of
from efft.planning.targets import select

#: Biases and norms are trained if this rank or a higher one fits beside them. In experiments with a ViT-S a layer's own
#: parameters gained more than ranks above this one.
LEAST_RANK_BESIDE_EXTRAS = 4


def fit_budget(kind: Callable[..., AdapterConfig], model: nn.Module, budget: int, fields: Mapping[str, Any]) -> Any:
    """Return the configuration with the highest rank whose factors, biases and norms fit a number of parameters.

    If ``fields`` do not say what is trained beside the factors, all biases and norms that the model has are, provided
    that rank :data:`LEAST_RANK_BESIDE_EXTRAS` fits beside them. The head is not counted.

    Args:
        kind: the class of the configuration, with the fields rank, bias and norms, and groups with ``d_in`` and
            ``d_out``.
        model: the model to adapt; it may be on the meta device.
        budget: the largest number of parameters.
        fields: fields of the configuration, all but ``rank``.

    Raises:
        ValueError: no rank fits, and the error says the least number of parameters; ``budget`` is not a positive
            integer; ``fields`` have a rank; or as :func:`efft.inspect`.
    """
    if not is_size(budget, 2**63):
        raise ValueError(f"budget must be a positive number of parameters, got {quote(budget)}")
    if "rank" in fields:
        raise ValueError(f"a budget chooses the rank: give either budget or rank, got {budget} and {fields['rank']!r}")
    plain = kind(**fields)
    head = find_head(model, plain.head)
    structure = structure_of(model, head, share_tied=True)
    targets = select(model, structure, plain.targets, plain.exclude, plain.kinds)

    def config(rank: int, extras: Extras) -> AdapterConfig:
        return kind(**{**fields, **extras.as_fields(), "rank": rank})

    def count(rank: int, extras: Extras) -> int:
        groups = config(rank, extras).groups(model, targets)
        weights, _ = structure.with_tied({name: structure.weights[name] for group in groups for name in group.sites})
        beside = find_extras(model, extras, weights, head)
        return sum(group.n_parameters for group in groups) + sum(beside.values())

    groups: Any = config(1, plain.extras).groups(model, targets)
    widest = min(LARGEST_SIZE, max(min(group.d_in, group.d_out) for group in groups))
    wanted = {plain.extras: 1}
    if not {"bias", "norms"} & fields.keys():
        wanted = {EXTRAS_OF_ANY_MODEL: LEAST_RANK_BESIDE_EXTRAS} | wanted
    for extras, least_rank in wanted.items():
        low, high = 0, widest + 1  # the first fits, the last does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if count(middle, extras) <= budget else (low, middle)
        if low >= least_rank:
            return config(low, extras)
    raise ValueError(
        f"a budget of {budget:,} parameters is too small for this {type(model).__name__}: rank 1 needs "
        f"{count(1, plain.extras):,} (head apart); raise the budget, or adapt fewer weights (targets, exclude)"
    )
