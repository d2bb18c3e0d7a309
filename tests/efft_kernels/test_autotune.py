"""Test the autotuner, which measures the backends at run time, and the command that writes a table of measurements."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from efft_kernels import Backend, autotune, measured
from efft_kernels.measured import Case, Row, fastest

ROOT = Path(__file__).parents[2]
CASE = Case("tt_linear", 12608, 768, 2304, 32, "bfloat16", 9)
CPU = torch.device("cpu")


def row(case: Case, triton: float, eager: float = 100.0) -> Row:
    return Row(case, {"eager": eager, "triton": triton}, "measured on paper")


def prefers_triton(case: Case, device: torch.device) -> bool:
    return fastest(case, device, ["eager", "triton"]) == "triton"


@pytest.fixture(autouse=True)
def _nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "_rows", [])
    monkeypatch.setattr(measured, "_measurer", None)


def test_measured_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = tmp_path / "new" / "table.json"
    autotune.use_table(table)
    with mock.patch.object(autotune, "measure", side_effect=lambda case, device, backends: row(case, 50)) as measure:
        assert prefers_triton(CASE, CPU)
        assert prefers_triton(CASE, CPU)
        assert prefers_triton(replace(CASE, d_in=3072), CPU)
    assert measure.call_count == 2
    assert [r.case.d_in for r in measured.read(table)] == [768, 3072]
    assert list(table.parent.iterdir()) == [table]
    monkeypatch.setattr(measured, "_rows", [])
    autotune.use_table(table)
    with mock.patch.object(autotune, "measure", side_effect=AssertionError):
        assert prefers_triton(CASE, CPU), "the times must come from the file"


@pytest.mark.parametrize(
    ("module", "question"),
    [(torch.compiler, "is_compiling"), (torch, "are_deterministic_algorithms_enabled")],
    ids=["compiling", "deterministic"],
)
def test_when_nothing_is_measured(module: object, question: str, tmp_path: Path) -> None:
    autotune.use_table(tmp_path / "table.json")
    with (
        mock.patch.object(autotune, "measure", side_effect=AssertionError),
        mock.patch.object(module, question, return_value=True),
    ):
        assert not prefers_triton(CASE, CPU)


@pytest.mark.parametrize("op", autotune.OPS)
def test_a_measurement(op: str) -> None:
    """Each requested backend is measured; in this test the reference backend replaces the GPU kernels."""
    case = Case(op, 7, 24, 40, 5, "float32", 9)
    ran: list[str] = []

    def resolve(op: str, backend: str, *tensors: Tensor, **_: object) -> Backend:
        ran.append(backend)
        return Backend.EAGER if backend == "eager" else Backend.REFERENCE

    with (
        mock.patch(f"efft_kernels.ops.{op}.resolve", resolve),
        mock.patch.object(autotune, "_origin", return_value="here"),
    ):
        found = autotune.measure(case, CPU, ["eager", "triton", "cuda"], repeats=3)
    # An op may remember the backend of the first of its five calls.
    assert ran in (["eager", "triton", "cuda"], ["eager", "triton", "cuda"] * 5)
    assert found.microseconds.keys() == {"eager", "triton", "cuda"}
    assert found.case == case
    assert all(0 < us < 1e6 for us in found.microseconds.values())
    json.dumps(found.microseconds)


@pytest.mark.parametrize(
    ("module", "version"), [(mock.Mock(__version__="3.6.0"), "3.6.0"), (None, "not installed")], ids=["with", "without"]
)
def test_a_measurement_needs_no_triton(module: object, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled kernels are measured even if Triton is missing."""
    monkeypatch.setitem(sys.modules, "triton", module)
    assert autotune._origin(CPU).startswith(f"measured on a CPU, torch {torch.__version__}, triton {version}, 20")


def test_what_may_be_measured_later_is_not_settled(tmp_path: Path) -> None:
    with mock.patch.object(autotune.Autotuner, "can_measure", return_value=False):
        assert measured.is_final(CPU)
        autotune.use_table(tmp_path / "table.json")
        assert not measured.is_final(CPU)
    assert measured.is_final(CPU)


def test_the_command_needs_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--out", str(tmp_path / "t.json"), *["--tokens", "7", "--d-in", "24", "--d-out", "40", "--rank", "5"]]
    case = row(replace(CASE, tokens=7), 50)
    with mock.patch.object(torch.cuda, "is_available", return_value=False), pytest.raises(SystemExit):
        autotune.main(words)
    assert "there is no GPU to measure on" in capsys.readouterr().err
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(autotune, "_rivals", return_value=["eager", "cuda"]),
        mock.patch.object(autotune, "measure", return_value=case) as measure,
    ):
        assert autotune.main([*words, "--op", "tt_linear", "tt_gelu_linear"]) == 0
    assert all(call.args[1:] == ("cuda", ["eager", "cuda"]) for call in measure.call_args_list)
    assert [call.args[0].op for call in measure.call_args_list] == ["tt_linear", "tt_gelu_linear"]
    assert measured.read(tmp_path / "t.json") == (case, case)
    assert "tt_gelu_linear 7 24 40 5 bfloat16 triton 50.0 us, eager 100.0 us" in capsys.readouterr().out


@pytest.mark.parametrize("table", [None, "own.json"], ids=["unset", "set"])
def test_the_variable_plugs_it_in(table: str | None, tmp_path: Path) -> None:
    """Importing the package measures nothing, and imports the autotuner only if EFFT_AUTOTUNE is set."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("EFFT_AUTOTUNE", None)
    if table is not None:
        environment["EFFT_AUTOTUNE"] = str(tmp_path / table)
        measured.write(tmp_path / table, [row(CASE, 50)])
    program = (
        "import sys, efft_kernels\n"
        "from efft_kernels import measured\n"
        "print('efft_kernels.autotune' in sys.modules, measured._measurer is not None, measured._rows[0].origin)"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *plugged, origin = done.stdout.strip().split(" ", 2)
    assert plugged == [str(table is not None)] * 2
    assert (origin == "measured on paper") == (table is not None)


def test_inputs_do_not_advance_the_callers_generator() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    autotune._inputs(Case("tt_norm_linear", 7, 24, 40, 5, "float32", 9), CPU)
    assert torch.equal(torch.rand(1), expected)
