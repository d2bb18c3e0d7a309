"""Test the command that lists kernels and their times, with torch's operators on the CPU in the place of kernels."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from benchmarks import timeline
from benchmarks.__main__ import main
from benchmarks.ops import cases
from benchmarks.timeline import Span, busy, by_name, elapsed, outcome, spans_of
from efft_lab.record import read


def test_spans_are_the_outer_operators_in_the_order_of_their_start() -> None:
    a = torch.randn(64, 64)
    spans = spans_of(lambda: torch.nn.functional.linear(a, a).relu().sum(), "cpu", repeats=3)
    assert [span.kernel for span in spans] == ["aten::linear", "aten::relu", "aten::sum"]
    assert spans[0].start == 0
    assert all(one.start + one.us <= other.start for one, other in itertools.pairwise(spans))
    assert elapsed(spans) >= busy(spans) > 0


def test_sums_by_name() -> None:
    spans = [Span("a", 0.0, 1.0), Span("b", 2.0, 5.0), Span("a", 8.0, 2.5)]
    assert by_name(spans) == [{"kernel": "b", "calls": 1, "us": 5.0}, {"kernel": "a", "calls": 2, "us": 3.5}]
    assert (busy(spans), elapsed(spans)) == (8.5, 10.5)


def test_the_median_run_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = iter([[Span("slow", 0.0, 9.0)], [Span("fast", 0.0, 1.0)], [Span("median", 0.0, 2.0)]])
    monkeypatch.setattr(timeline, "_profiled", lambda run, cuda: next(runs))
    assert spans_of(lambda: None, "cpu", repeats=3)[0].kernel == "median"


def test_a_profiler_without_kernels_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "_profiled", lambda run, cuda: [])
    found = outcome(lambda: None, "cpu", repeats=1, ordered=True)
    assert found == {"reason": "failed: the profiler recorded no kernel; on a GPU it needs permission to use CUPTI"}


def test_the_command_records_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm", reason="needs the vision extra")
    monkeypatch.setenv("EFFT_SM90_GENERATION", "2")
    monkeypatch.setitem(cases.MODELS, "tiny", (16, 7))
    tiny = "--layers-of tiny --images 1 --model test_vit --batch 1 --rank 2 --repeats 1"
    for backend in ("eager", "cuda"):
        options = f"--device cpu --backend {backend} --dtype float32 --results {tmp_path} {tiny}"
        assert main(["timeline", *options.split()]) == 0
    lines = read(tmp_path / "timeline.jsonl")
    rows = [(line.get("case", "step"), line["row"].partition(":")[0]) for line in lines]
    layers = [(case, row) for case in ("qkv", "o", "fc1", "fc2") for row in ("floor", "efft", "packed")]
    assert rows == 2 * [*layers, *(("step", row) for row in ("floor", "efft", "fused"))]
    assert all(line["generation"] == 2 for line in lines)
    for line in lines:
        if line["row"].endswith(":cuda"):
            assert line["reason"].startswith("not available")
            continue
        assert line["launches"] > 0
        assert line["kernels"][0].keys() == ({"kernel", "start", "us"} if "case" in line else {"kernel", "calls", "us"})
    assert "us in kernels" in capsys.readouterr().out
