"""Test the benchmark of a mixture-of-experts module whose weight matrices have updates.

Each row is one implementation, and a row with wrong results is not timed.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks import experts
from benchmarks.__main__ import main
from benchmarks.experts import ROWS, Case, Inputs, Trained, measure
from efft_lab.record import read

pytest.importorskip("transformers", reason="needs the hf extra")
pytest.importorskip("peft", reason="needs the hf extra")

TINY = Case("tiny", tokens=64, rank=4)


def test_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "experts --model tiny --tokens 64 --rank 4 --dtype float32 bfloat16 --device cpu --repeats 1"
    assert main([*command.split(), "--results", str(tmp_path)]) == 0
    lines = read(tmp_path / "experts.jsonl")
    assert [(line["dtype"], line["row"]) for line in lines] == [
        (dtype, row) for dtype in ("float32", "bfloat16") for row in ROWS
    ]
    for line in lines:
        assert line["reason"] is None, line
        assert line["ratio"]["fwd"]["n"] == line["ratio"]["fwd_bwd"]["n"] == 1
        assert {"suite", "machine", "commit", "model", "tokens", "rank"} <= line.keys()
    floor, efft, lora, dense = lines[:4]
    assert (floor["trained"], efft["trained"]) == (0, 4 * (64 + 32) + 12 * 16)
    assert dense["trained"] == efft["trained"]
    assert lora["trained"] == 4 * 4 * ((64 + 64) + (32 + 64))
    assert re.search(r"efft +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +576\n", capsys.readouterr().out)


def test_what_the_update_keeps_for_backward() -> None:
    """Check that the update saves no tensor as large as a weight for the backward pass.

    It saves the inputs of both products, small intermediate results that it computes from these inputs, and the
    factors.
    """
    kept = {line["row"]: line["saved_bytes"] for line in measure(TINY, list(ROWS), repeats=1)}
    rows, sizes = 64 * 2, 4 * 3 * 64 * 32
    assert kept["dense"] - kept["floor"] >= 4 * sizes
    activations = 64 * 64 + rows * 32  # the inputs of the two products
    small = rows * (4 + 8 + 4 + 4) + 2 * rows + 12 * 16 + 2 * 4 * (64 + 32)
    assert activations <= (kept["efft"] - kept["floor"]) / 4 <= activations + small


def test_a_row_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(inputs: Inputs) -> Trained:
        row = ROWS["efft"](inputs)
        with torch.no_grad():
            row.run.adapted_parameters["down_proj"].enabled = False
        return row

    def missing(inputs: Inputs) -> Trained:
        raise ImportError("no module named peft")

    monkeypatch.setattr(experts, "ROWS", {**ROWS, "half": half, "missing": missing})
    floor, wrong, absent = measure(TINY, ["floor", "half", "missing"], repeats=1)
    assert wrong["reason"].startswith("failed: ") or wrong["reason"].startswith("error over 2 times")
    assert absent["reason"] == "failed: no module named peft"
    assert "seconds" not in wrong
    assert floor["seconds"]["fwd_bwd"]["n"] == 1
