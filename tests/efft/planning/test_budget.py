"""Test that a budget of parameters determines the rank and whether biases are trained."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn

import efft
from efft.methods.efft import AUTOMATIC

Make = Callable[..., nn.Module]

#: Number of entries of the biases of proj, fc1 and fc2 in the tiny ViT (d = 16, two blocks).
BIASES = 2 * (16 + 64 + 16)


def factors(rank: int) -> int:
    """Return the number of parameters of EFFT2 in the tiny ViT at rank r.

    The attention has factors [16, r], 2 x 4 cores [r, r] and [r, 16]. The MLP has [16, r], 2 x 2 cores and [r, 64].
    """
    return 2 * 16 * rank + 8 * rank**2 + (16 + 64) * rank + 4 * rank**2


@pytest.mark.parametrize(
    ("budget", "rank", "biases"),
    [
        (factors(4) + BIASES, 4, True),
        (factors(5) + BIASES - 1, 4, True),
        (factors(7) + BIASES, 7, True),
        (factors(4) + BIASES - 1, 4, False),
        (factors(1), 1, False),
        (10**9, 16, True),
    ],
)
def test_the_largest_rank_that_fits(budget: int, rank: int, biases: bool, tiny_vit: Make) -> None:
    assert factors(4) <= factors(4) + BIASES - 1 < factors(5)
    with torch.device("meta"):
        model = tiny_vit()
    config = efft.EfftConfig.auto(budget=budget, model=model)
    bias = "auto" if biases else "none"
    assert config == efft.EfftConfig(**{**AUTOMATIC, "rank": rank, "bias": bias})
    count = efft.count_parameters(efft.apply(tiny_vit(), config))
    assert count.factors + count.extras == factors(rank) + BIASES * biases <= budget


@pytest.mark.parametrize(
    ("fields", "extras"), [({"bias": "none"}, 0), ({"norms": True}, 160), ({"bias": "adapted", "norms": False}, 288)]
)
def test_what_is_given_stays(fields: dict[str, Any], extras: int, tiny_vit: Make) -> None:
    config = efft.EfftConfig.auto(budget=factors(2) + extras, model=tiny_vit(), **fields)
    assert config.rank == 2
    assert all(getattr(config, name) == value for name, value in fields.items())


def test_models_without_biases() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)) for _ in range(2)])
    config = efft.EfftConfig.auto(budget=300, model=model, head=[])
    count = efft.count_parameters(efft.apply(model, config))
    assert count.extras == 0 < count.factors <= 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"budget": factors(1) - 1},
            f"a budget of {factors(1) - 1} parameters is too small .*: rank 1 needs {factors(1)} ",
        ),
        ({"budget": 500, "bias": "all"}, rf"rank 1 needs {factors(1) + 384} \(excluding the head\)"),
        ({"budget": 0}, "budget must be a positive number of parameters, got 0"),
        ({"budget": 1000, "rank": 4}, "pass either budget or rank, got 1000 and 4"),
        ({}, r"a number of parameters \(budget=\.\.\.\) is missing"),
    ],
)
def test_wrong_budgets(
    arguments: dict[str, Any],
    message: str,
    tiny_vit: Make,
    unchanged: Callable[[nn.Module], AbstractContextManager[None]],
) -> None:
    model = tiny_vit()
    with unchanged(model), pytest.raises(ValueError, match=message):
        efft.EfftConfig.auto(model=model, **arguments)


def test_a_budget_needs_a_model() -> None:
    with pytest.raises(ValueError, match=r"the model to count in \(model=\.\.\.\) is missing"):
        efft.EfftConfig.auto(budget=1000)


def test_without_a_budget() -> None:
    assert efft.EfftConfig.auto(rank=8) == efft.EfftConfig(**{**AUTOMATIC, "rank": 8})
    efft.EfftConfig.auto().rates.clear()
    assert efft.EfftConfig.auto() == efft.EfftConfig(**AUTOMATIC), "configurations must not share their rates"


@pytest.mark.parametrize(("epochs", "dropout"), [(None, 0.0), (10, 0.0), (29.5, 0.0), (30, 0.1), (100, 0.1)])
def test_dropout_depends_on_the_length_of_the_training(tiny_vit: Make, epochs: float | None, dropout: float) -> None:
    assert efft.EfftConfig.auto(epochs=epochs) == efft.EfftConfig(**{**AUTOMATIC, "dropout": dropout})
    config = efft.EfftConfig.auto(epochs=epochs, budget=400, model=tiny_vit())
    assert config.dropout == dropout
    assert efft.EfftConfig.auto(epochs=epochs, dropout=0.3).dropout == 0.3, "a field that is given must win"


@pytest.mark.parametrize("epochs", [0, -1, float("nan"), float("inf"), "100", True])
def test_wrong_epochs(epochs: Any) -> None:
    with pytest.raises(ValueError, match=r"EfftConfig\.auto: epochs must be a positive number, got"):
        efft.EfftConfig.auto(epochs=epochs)
