"""Choose the rank, and whether to train biases, for a given number of parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from efft.config import LARGEST_SIZE, is_size, quote
from efft.planning.extras import Extras

#: Biases are trained only if the budget also allows at least this rank. In experiments with a ViT-S, training biases
#: improved accuracy more than raising the rank above this value.
LEAST_RANK_WITH_BIASES = 4


def fit_budget(kind: Callable[..., Any], model: nn.Module, budget: int, fields: Mapping[str, Any]) -> Any:
    """Return a configuration whose factors, trained biases and trained norms have at most ``budget`` parameters.

    The rank is the highest that the budget allows. If ``fields`` do not contain ``bias``, biases are trained
    (``bias="auto"``) if the budget also allows rank :data:`LEAST_RANK_WITH_BIASES`, and otherwise not. The head is not
    counted.

    Args:
        kind: the class of the configuration, which has the fields rank, bias and norms, and a method ``planner``
            (:meth:`efft.EfftConfig.planner`).
        model: the model to adapt; it may be on the meta device.
        budget: the largest number of parameters.
        fields: fields of the configuration, except ``rank``.

    Raises:
        ValueError: ``budget`` is not a positive integer, ``fields`` contain a rank, or no rank fits (the message then
            gives the least possible number of parameters). Invalid fields raise the same errors as in
            :func:`efft.inspect`.
    """
    if not is_size(budget, 2**63):
        raise ValueError(f"budget must be a positive number of parameters, got {quote(budget)}")
    if "rank" in fields:
        raise ValueError(f"a budget chooses the rank: pass either budget or rank, got {budget} and {fields['rank']!r}")
    plain = kind(**fields)
    plan = plain.planner(model)

    def config(rank: int, extras: Extras) -> Any:
        return kind(**{**fields, **extras.as_fields(), "rank": rank})

    def count(rank: int, extras: Extras) -> int:
        groups, beside = plan(config(rank, extras))
        return sum(group.n_parameters for group in groups) + beside

    groups, _ = plan(config(1, plain.extras))
    widest = min(LARGEST_SIZE, max(min(group.d_in, group.d_out) for group in groups))
    wanted = {plain.extras: 1}
    if "bias" not in fields:
        wanted = {Extras("auto", plain.extras.norms): LEAST_RANK_WITH_BIASES} | wanted
    for extras, least_rank in wanted.items():
        low, high = 0, widest + 1  # sentinels: every rank up to low fits, and no rank from high on does
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if count(middle, extras) <= budget else (low, middle)
        if low >= least_rank:
            return config(low, extras)
    raise ValueError(
        f"a budget of {budget:,} parameters is too small for this {type(model).__name__}: rank 1 needs "
        f"{count(1, plain.extras):,} (excluding the head); raise the budget, or adapt fewer weights (targets, exclude)"
    )
