"""Test the result lines of the benchmark that times ``efft.inspect``, which plans which layers to adapt."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import planning


def test_lines(tmp_path: Path) -> None:
    assert planning.main(["--blocks", "1", "2", "--repeats", "1", "--results", str(tmp_path)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "planning.jsonl").read_text().splitlines()]
    assert [line["layers"] for line in lines] == [196, 392]
    assert all(line["seconds"]["p50"] > 0 for line in lines)
