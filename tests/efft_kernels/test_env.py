"""Test the environment report, ``python -m efft_kernels``."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from efft_kernels import Backend, __version__, can_run, env, testing
from efft_kernels.build import TARGETS, find
from efft_kernels.native import MISSING
from tests.csrc.cpu.check import instruction_sets

ROOT = Path(__file__).parents[2]


def lines() -> dict[str, str]:
    """Return the lines of the report, keyed by their first words."""
    return {re.match(r"\w+ (on \w+|library)|\S+", line)[0]: line for line in env.report().splitlines()}


def test_versions_and_devices() -> None:
    report = lines()
    assert platform.python_version() in report["python"]
    assert torch.__version__.partition("+")[0] in report["torch"]
    assert report["efft-kernels"].split()[1] in (__version__, "not")
    assert f"{torch.get_num_threads()} threads" in report["cpu"]
    assert torch.cuda.is_available() or "not available" in report["cuda"]


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "_PACKAGES", ("torch", "no-such-package"))
    assert lines()["no-such-package"] == "no-such-package not installed"


def test_backend_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFT_BACKEND", "auto")
    assert lines()["EFFT_BACKEND"].startswith("EFFT_BACKEND  auto (calls without backend= ask for ")
    monkeypatch.delenv("EFFT_BACKEND")
    line = lines()["EFFT_BACKEND"]
    assert line.startswith("EFFT_BACKEND  not set (")
    assert line.endswith("'auto' tries cpu, eager, reference)")


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_loaded_or_why_not(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, reason = find(target), MISSING[target]
    shown = lines()[f"{target} library"]
    if target == "cpu" and reason is None:
        shown, _, isa = shown.partition(", instruction set: ")
        assert isa in instruction_sets()  # the best set, unless the system does not provide the matrix registers
    assert shown == f"{target + ' library':<13} {path if reason is None else f'not loaded: {reason}'}"
    monkeypatch.setitem(MISSING, target, "it is broken")
    assert lines()[f"{target} library"] == f"{target + ' library':<13} not loaded: it is broken"


def test_every_backend_passes_on_every_device() -> None:
    report = lines()
    for backend in testing.backends():
        for device in testing.devices():
            reason = can_run(backend, torch.ones(1, device=device))
            expected = "self-test passed" if reason is None else f"cannot run: {reason}"
            assert expected in report[f"{backend.value} on {device}"]


@pytest.mark.skipif(MISSING["cpu"] is not None, reason=MISSING["cpu"] or "")
def test_a_setting_that_stops_a_backend_is_in_the_report() -> None:
    environment = {**os.environ, "EFFT_CPU_ISA": "sse9"}
    command = [sys.executable, "-m", "efft_kernels"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "instruction set: none, because the value of EFFT_CPU_ISA is unknown" in done.stdout
    assert "cpu on cpu         self-test FAILED: RuntimeError: EFFT_CPU_ISA must be one of " in done.stdout


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    """One gradient of one backend is wrong by only a thousandth, or is NaN."""
    right = torch.ops.efft.tt_linear_bwd.eager
    monkeypatch.setitem(
        sys.modules["efft_kernels.ops.tt_linear"]._BACKWARD,
        Backend.EAGER,
        lambda *args: (*right(*args)[:2], wrong * right(*args)[2]),
    )
    report = lines()
    assert "self-test FAILED" in report["eager on cpu"]
    assert "self-test passed" in report["reference on cpu"]


@pytest.mark.parametrize("broken", [False, True])
def test_the_command(tmp_path: Path, broken: bool) -> None:
    """The exit code is 1 if a self-test failed; the report is printed in both cases."""
    program = "import runpy\n" + "import efft_kernels.env as e; e._relative = lambda a, b: 1.0\n" * broken
    command = [sys.executable, "-c", program + "runpy.run_module('efft_kernels', run_name='__main__')"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == broken, done.stderr
    assert done.stdout.startswith("python ")
    assert ("FAILED" in done.stdout) == broken
