"""Test the order in which rows (the compared functions) are timed, their ratios, and the lines of result files."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks.timing import ratios, time_rows
from efft_lab import record


def test_every_round_runs_every_row_once_after_the_warm_up() -> None:
    order: list[str] = []
    samples = time_rows({name: lambda name=name: order.append(name) for name in "abc"}, repeats=4, warmup=2)
    assert "".join(order) == "abc" * 6
    assert {name: len(seconds) for name, seconds in samples.items()} == {"a": 4, "b": 4, "c": 4}


def test_the_warm_up_is_not_measured() -> None:
    pauses = iter([0.2, 0.01, 0.01])
    (seconds,) = time_rows({"row": lambda: time.sleep(next(pauses))}, repeats=2, warmup=1).values()
    assert all(0.01 <= t < 0.2 for t in seconds)


def test_ratios_are_taken_within_a_repetition() -> None:
    """Check that ratios do not change if the machine is four times slower in one repetition, here in the last one."""
    assert ratios({"floor": [1.0, 1.0, 4.0], "row": [2.0, 3.0, 8.0]}) == {"floor": [1, 1, 1], "row": [2, 3, 2]}


def test_quantiles() -> None:
    assert record.quantiles([10.0, *range(10)]) == {"min": 0, "p20": 2, "p50": 5, "p80": 8, "n": 11}


def test_result_lines_are_appended_and_say_where_they_come_from(tmp_path: Path) -> None:
    for figure in (1, 2):
        path = record.append("some", [{**record.machine_facts(), "figure": figure}], tmp_path / "new")
    lines = record.read(path)
    assert path == tmp_path / "new" / "some.jsonl"
    assert [line["figure"] for line in lines] == [1, 2]
    assert lines[0].keys() >= {"date", "machine", "cores", "versions", "commit", "command"}
    assert json.loads(path.read_text().splitlines()[0]) == lines[0]


@pytest.mark.parametrize("variables", [{}, {"EFFT_SM90_GENERATION": "3", "EFFT_BACKEND": "cuda"}], ids=str)
def test_the_command_names_variables_that_select_kernels(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("EFFT_SM90_GENERATION", "EFFT_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    record._process_facts.cache_clear()
    try:
        expected = "EFFT_BACKEND=cuda EFFT_SM90_GENERATION=3 python" if variables else "python"
        assert record.machine_facts()["command"].startswith(expected)
    finally:
        record._process_facts.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "graphs"])
@pytest.mark.parametrize("flush", [False, True], ids=["warm", "cold"])
def test_on_a_gpu_the_device_is_timed(graphs: bool, flush: bool) -> None:
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    rows = {"one": lambda: a @ a, "four": lambda: (a @ a) @ (a @ a) @ a}
    samples = time_rows(rows, repeats=5, device="cuda", flush_l2=flush, cuda_graphs=graphs)
    one, four = (sorted(seconds)[2] for seconds in samples.values())
    assert 3 < four / one < 5
