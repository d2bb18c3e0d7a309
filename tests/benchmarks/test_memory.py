"""Compare the measured bytes that autograd saves with formulas, and the measured peak with a known allocation.

Other tests run the command, and check that a row that cannot be measured reports a reason.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.__main__ import main
from benchmarks.memory import (
    in_new_process,
    measure_layer,
    measure_model,
    parser,
    saved_for_backward,
    specifications,
)
from benchmarks.model.step import Setting
from benchmarks.ops import cases
from benchmarks.ops.cases import Case
from efft_lab.record import read

pytest.importorskip("timm", reason="needs the vision extra")

ROOT = Path(__file__).parents[2]


def test_each_storage_counts_once() -> None:
    x = torch.randn(8, 16, requires_grad=True)

    def forward() -> torch.Tensor:
        y = x.exp()  # saves y
        return y[:4] * y[4:]  # saves two views of y

    assert saved_for_backward(forward) == 8 * 16 * 4


def test_nothing_stays_behind() -> None:
    x, seen = torch.randn(8, requires_grad=True), []

    def forward() -> torch.Tensor:
        y = x.exp()  # the graph of this output saves the output
        seen.append(weakref.ref(y))
        return y.sum()

    saved_for_backward(forward)
    assert [ref() for ref in seen] == [None, None]


def test_a_view_keeps_its_whole_storage() -> None:
    x = torch.randn(8, 16, requires_grad=True)
    assert saved_for_backward(lambda: (2 * x)[:1].exp()) == 16 * 4
    assert saved_for_backward(lambda: (2 * x)[:1] ** 2) == 8 * 16 * 4


def test_what_was_there_before_counts_only_as_input() -> None:
    x, W = torch.randn(8, 16), torch.randn(4, 16, requires_grad=True)
    assert saved_for_backward(lambda: F.linear(x, W)) == 0
    assert saved_for_backward(lambda: F.linear(x, W), [x]) == 8 * 16 * 4


def test_nothing_is_kept_without_gradients() -> None:
    x = torch.randn(8, 16)
    assert saved_for_backward(x.exp) == 0


def test_a_layer_keeps_what_its_formula_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare three rows (implementations of a layer) with the tensors that their formulas need.

    The frozen layer y = x Wᵀ saves no new tensor. The low-rank update saves x and h = x D. The dense form saves x and
    the sum W + dW.
    """
    monkeypatch.setitem(cases.MODELS, "tiny", (16, 7))
    spec = {**asdict(Case("fc1", "tiny", images=3, rank=4, dtype="float32")), "device": "cpu"}
    tokens, d_in, d_out, rank, width = 21, 16, 64, 4, 4
    kept = {row: measure_layer({**spec, "row": row})["saved_bytes"] for row in ("floor", "efft:eager", "naive")}
    assert kept == {
        "floor": 0,
        "efft:eager": width * tokens * (d_in + rank),
        "naive": width * (tokens * d_in + d_in * d_out),
    }


def test_a_model_row_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.memory.unavailable", lambda row, setting: "no such device")
    assert measure_model({**asdict(Setting()), "row": "efft:eager"}) == {"reason": "not available: no such device"}


def test_peak_is_that_of_the_step() -> None:
    """Run two steps in a new process. Each step allocates two buffers of 200 MB and frees them."""
    code = (
        "import json; from benchmarks.memory import peak\n"
        "step = lambda: len(bytes(bytearray(b'x') * 200_000_000))\n"
        "print(json.dumps(peak(step, 'cpu')))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["before_bytes"] > 0
    assert 190e6 < found["peak_bytes"] - found["before_bytes"] < 450e6


@pytest.mark.slow
def test_command_measures_each_row_in_its_own_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["memory", "--level", "model", "--model", "test_vit", "--rank", "4", "--rows", "efft:eager", "--quick"]
    assert main([*command, "--device", "cpu", "--results", str(tmp_path)]) == 0
    floor, eager = read(tmp_path / "memory.jsonl")
    assert floor["saved_bytes"] < eager["saved_bytes"]
    assert floor["peak_bytes"] >= floor["before_bytes"] > 0
    assert {"suite", "level", "machine", "commit", "model", "batch", "dtype", "row"} <= floor.keys()
    assert "saved MiB" in capsys.readouterr().out


def test_a_process_that_dies_leaves_its_last_words() -> None:
    assert in_new_process("model", {"row": "no_such_row"}) == {"reason": "failed: KeyError: 'no_such_row'"}


def test_a_row_is_refused_if_no_requested_level_has_it() -> None:
    def rows(*options: str) -> set[tuple[str, str]]:
        args = parser().parse_args(["--quick", *options])
        return {(level, spec["row"]) for level, spec in specifications(args)}

    only_layer, only_model = "addmm", "full"
    both = rows("--rows", only_layer, only_model)
    assert both == {("layer", "floor"), ("layer", only_layer), ("model", "floor"), ("model", only_model)}
    with pytest.raises(ValueError, match="unknown row 'ful'"):
        rows("--rows", "ful")
    with pytest.raises(ValueError, match=f"unknown row '{only_model}'"):
        rows("--level", "layer", "--rows", only_model)
