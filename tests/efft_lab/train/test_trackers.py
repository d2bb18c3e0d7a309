"""Test that experiment trackers receive the same records as metrics.jsonl, and the errors for unusable trackers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from efft_lab.cli import main
from efft_lab.train import TrainConfig, read_metrics, run

tracking = pytest.importorskip("accelerate.tracking", reason="training needs the train extra")


class Notes(tracking.GeneralTracker):  # type: ignore[misc,name-defined]
    """Keep all records in memory."""

    name, requires_logging_directory = "notes", False

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.records: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    @property
    def tracker(self) -> Notes:
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        assert step is not None
        self.records.append((step, values))

    def finish(self) -> None:
        self.finished += 1


def test_a_tracker_gets_every_number(
    config: TrainConfig, task: Any, make_model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    notes = Notes()
    result = run(config, tmp_path, model=make_model(), task=task, log_with=[notes]).summary
    assert notes.finished == 1
    assert (notes.config["efft.rank"], notes.config["lr"], notes.config["adapter"]) == (4, 1e-2, "None")
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert len(notes.records) == len(records) + 1
    for record, (step, values) in zip(records, notes.records, strict=False):
        expected = {k: v for k, v in record.items() if k not in ("kind", "update") and v is not None}
        assert step == record["update"]
        assert values == {f"{record['kind']}/{name}": value for name, value in expected.items()}
    assert notes.records[-1] == (16, {"test/accuracy": result["test_accuracy"]})


def test_a_run_without_trackers_has_no_folder_for_them(
    config: TrainConfig, task: Any, make_model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    run(config, tmp_path, model=make_model(), task=task)
    assert not (tmp_path / "tracked").exists()


def test_missing_packages_are_named(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with pytest.raises(ImportError, match="logging with comet-ml, wandb needs its package: pip install comet-ml wandb"):
        run(config, tmp_path / "run", log_with=["comet_ml", "wandb"])
    assert not (tmp_path / "run").exists()
    assert main(["train", "--out", str(tmp_path / "run"), "--log-with", "tensorboard", "wandb"]) == 2
    assert "pip install tensorboard wandb" in capsys.readouterr().err


def test_unknown_trackers_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown tracker 'tensorbord' in log_with; did you mean 'tensorboard'"):
        run(config, tmp_path / "run", log_with=["tensorbord"])


def test_tensorboard(config: TrainConfig, task: Any, make_model: Callable[[], nn.Module], tmp_path: Path) -> None:
    for package in ("tensorboard", "tensorboardX"):
        try:
            __import__(package)
            break
        except ImportError:
            continue
    else:
        pytest.skip("needs tensorboard or tensorboardX")
    for _ in range(2):
        run(config, tmp_path, model=make_model(), task=task, log_with=["tensorboard"], overwrite=True)
    assert len(list((tmp_path / "tracked/efft").glob("events.*"))) == 1
