"""Test that a table lists the source of every run, and that it compares a setting with the default on common runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import study_tables
from efft_lab import record

RUN = {"task": "docstrings", "row": "EFFT2", "parameters": 10, "commit": "abc", "machine": "a CPU", "versions": {}}


def sources(monkeypatch: pytest.MonkeyPatch, folder: Path, *lines: dict[str, object]) -> list[str]:
    """Return the sources that are listed below the table of a study whose result file contains ``lines``."""
    text = "".join(json.dumps({**RUN, "test_accuracy": 0.5, **line}) + "\n" for line in lines)
    (folder / "text.jsonl").write_text(text, encoding="utf-8")
    monkeypatch.setattr(record, "RESULTS", folder)
    return [line for line in study_tables.study("text").splitlines() if line.startswith("- ")]


def test_runs_with_equal_tasks_keep_all_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = {"seed": 0, "date": "2026-01-01T00:00:00", "command": "text --seeds 0"}
    second = {"seed": 1, "date": "2026-01-02T00:00:00", "command": "text --seeds 1"}
    assert sources(monkeypatch, tmp_path, first, second) == [
        "- docstrings: `text --seeds 0`, commit abc, a CPU; ; 2026-01-01",
        "- docstrings: `text --seeds 1`, commit abc, a CPU; ; 2026-01-02",
    ]


def test_the_source_of_a_single_run_names_its_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = {"date": "2026-01-01T00:00:00", "command": "text"}
    assert sources(monkeypatch, tmp_path, {**run, "seed": 0}, {**run, "seed": 1}) == [
        "- docstrings: `text`, commit abc, a CPU; ; 2026-01-01"
    ]


def test_a_setting_is_compared_with_the_default_on_common_runs_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    facts = {
        "stage": "explore",
        "trained": 10,
        "commit": "abc",
        "machine": "a CPU",
        "versions": {},
        "date": "2026-01-01",
    }
    default, other = study_tables._DEFAULT_EXTRAS, "efft2 r16 x0 c3 movement0.1"
    runs = [(default, "a", 0.5), (default, "b", 0.6), (other, "a", 0.4), (other, "b", 0.54), (other, "c", 0.0)]
    rows = [
        {**facts, "variant": name, "task": task, "seed": 0, "dev_accuracy": x, "test_accuracy": x, "command": "run"}
        for name, task, x in runs
    ]
    (tmp_path / "extras.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert "| no biases | 10 | 2 | -8.0 ± 2.0 | -8.0 ± 2.0 |" in study_tables.extras().splitlines()


def test_dropout_is_compared_at_equal_lengths_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    facts = {"stage": "explore", "commit": "abc", "machine": "a CPU", "versions": {}, "date": "2026-01-01", "seed": 0}
    default = study_tables._DEFAULT_EXTRAS
    short = [(default, "a", 62, 0.5), (f"{default} dropout0.1", "a", 62, 0.4), (f"{default} dropout0.3", "a", 62, 0.0)]
    long = [
        (f"{default} e100 b64", "a", 99, 0.5),
        (f"{default} dropout0.1 e100 b64", "a", 99, 0.53),
        (f"{default} e100 b64", "b", 99, 0.5),
        (f"{default} dropout0.1 e100 b64", "b", 99, 0.55),
        (f"{default} dropout0.1 e100 b64", "c", 99, 0.9),
    ]
    for name, runs in (("extras", short), ("extras_long", long)):
        rows = [
            {**facts, "variant": v, "task": t, "updates": n, "dev_accuracy": x, "test_accuracy": x, "command": "run"}
            for v, t, n, x in runs
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    written = study_tables.dropout().splitlines()
    assert "| 10 | 62 | a | 1 | -10.0 | -10.0 |" in written
    assert "| 100 | 99 | a, b | 2 | +4.0 ± 1.0 | +4.0 ± 1.0 |" in written
