"""Test the benchmark of attention and Conv1D: which rows (implementations) are timed, and the result lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import kinds
from benchmarks.kinds import KINDS, ROWS, Case


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_exact(kind: str) -> None:
    """In much smaller cases, the errors of two orders of sums may differ by more than a factor of 2 by chance."""
    for name, row in ROWS.items():
        errors = row(Case(kind, width=128, batch=2, tokens=50, rank=8)).errors()
        assert errors.keys() >= {"y", "dx"}, name
        assert max(errors.values()) <= 2, (name, errors)


def test_a_wrong_row_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(case: Case) -> kinds.Trained:
        row = ROWS["efft"](case)
        right = row.model
        row.model = lambda x: right(x) * (1 + 1e-4)
        return row

    monkeypatch.setitem(ROWS, "wrong", wrong)
    floor, line = kinds.measure(Case("conv1d", width=16, batch=1, tokens=3, rank=2), ["floor", "wrong"], 1)
    assert "seconds" in floor
    assert "over 2 times" in line["reason"]
    assert "seconds" not in line


def test_lines(tmp_path: Path) -> None:
    options = ["--kind", "conv1d", "--width", "16", "--batch", "1", "--rank", "2", "--repeats", "1"]
    assert kinds.main([*options, "--results", str(tmp_path), "--device", "cpu"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "kinds.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(ROWS)
    assert lines[1]["trained"] == 16 * 2 + 2 * 2 + 2 * 64
    assert torch.tensor([line["ratio"]["fwd_bwd"]["p50"] for line in lines]).gt(0).all()
