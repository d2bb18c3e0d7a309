"""Test the heat map of a report with results whose means are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from efft_lab.compare import plots
from efft_lab.compare.agenda import Agenda
from efft_lab.compare.suite import Suite


@pytest.fixture
def agenda(tiny: dict[str, Any]) -> Agenda:
    grid = {"efft.rank": [2, 4], "efft.scale": [1.0, 10.0, 100.0]}
    tiny["methods"] = {"EFFT2": {"method": "efft", "grid": grid}}
    return Agenda(Suite(**tiny))


def test_a_heat_map_shows_means_over_tasks(agenda: Agenda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="needs the train extra")
    shown: list[Any] = []
    monkeypatch.setattr(pyplot, "close", shown.append)
    runs = agenda.search("digits", "EFFT2")
    done: dict[str, Any] = {run.key: {"val_accuracy": i / 10} for i, run in enumerate(runs)}
    done[runs[1].key] = {"failed": "the loss is nan"}
    del done[runs[5].key]
    target = tmp_path / "map.png"
    plots.heat_map(agenda, "EFFT2", done, target)
    assert target.stat().st_size > 5_000
    axes = shown[0].axes[0]
    texts = {(text.get_position()): text.get_text() for text in axes.texts}  # (column, row)
    assert texts == {(0, 0): "0.0", (1, 0): "0.0", (2, 0): "20.0", (0, 1): "30.0", (1, 1): "40.0", (2, 1): "nan"}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "10", "100"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["2", "4"]
