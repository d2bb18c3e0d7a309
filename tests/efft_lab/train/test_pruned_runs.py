"""Test ``prune_at``, which lowers the ranks in the middle of a run.

After that, the run must continue its schedule and save its adapter like any other run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import efft
from efft_lab.train import TrainConfig, read_metrics, run


@pytest.fixture
def config(config: TrainConfig) -> TrainConfig:
    return replace(config, prune_at=2, prune_keep=0.7)


def test_ranks_fall_and_the_schedule_goes_on(
    config: TrainConfig, task: Any, make_model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    result = run(config, tmp_path / "pruned", model=make_model(), task=task)
    assert result.model is not None
    (cut,) = read_metrics(tmp_path / "pruned/metrics.jsonl", "prune")
    ranks = {name: tuple(rank) for name, rank in cut["ranks"].items()}
    assert (cut["epoch"], cut["update"]) == (2, 8)
    assert all(r1 < 4 or r2 < 4 for r1, r2 in ranks.values())
    assert all(0 < error**2 <= 0.3 for error in cut["relative_error"].values())
    assert result.summary["best_epoch"] >= 2, "the selected epoch must have the final ranks"

    assert result.model.efft.config.rank == ranks  # type: ignore[union-attr]
    assert result.summary["factor_parameters"] == efft.count_parameters(result.model).factors
    fresh = efft.load_adapter(make_model(), tmp_path / "pruned/adapter").eval()
    efft.fuse(fresh)
    images = torch.randn(5, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(fresh(images), result.model(images))

    run(replace(config, prune_at=None), tmp_path / "whole", model=make_model(), task=task)
    rates = [
        [step["lr"] for step in read_metrics(tmp_path / name / "metrics.jsonl", "step")] for name in ("pruned", "whole")
    ]
    assert rates[0] == pytest.approx(rates[1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prune_at": 1, "epochs": 1}, "before the last, but epochs is 1; got 1"),
        ({"prune_at": 4}, "must be an epoch before the last, from 1 to 3, got 4 with method 'efft'"),
        ({"prune_at": 0}, "1 to 3, got 0"),
        ({"method": "linear"}, "prune_at needs method efft .* with method 'linear'"),
        ({"prune_keep": 0.0}, r"prune_keep must be in \(0, 1\], got 0.0"),
        ({"prune_keep": 1.5}, r"prune_keep must be in \(0, 1\], got 1.5"),
    ],
)
def test_settings_that_are_refused(changed: dict[str, Any], message: str, config: TrainConfig) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config, **changed)
