"""Test the benchmark of training several adapters in one pass, with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import together


def test_rows_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm", reason="needs the vision extra")
    options = ["--model", "test_vit", "--image-size", "32", "--batch", "2", "--adapters", "2", "--rank", "2"]
    arguments = [*options, "--repeats", "2", "--dtype", "float32", "--device", "cpu", "--results", str(tmp_path)]
    assert together.main(arguments) == 0
    lines = [json.loads(line) for line in (tmp_path / "together.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == ["alone", "fused", "K=2"]
    assert lines[0]["of_alone"] == 1
    assert all(line["seconds_per_image"]["p50"] > 0 for line in lines)
    assert "of one model alone" in capsys.readouterr().out
