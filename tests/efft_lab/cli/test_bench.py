"""Test ``python -m benchmarks`` and ``efft bench``."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.__main__ import COMMANDS, main
from efft_lab.cli import bench
from efft_lab.cli import main as efft


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert main(["--help"]) == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert lines == [*COMMANDS, *COMMANDS]


def test_a_command_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["modell"]) == 2
    assert capsys.readouterr().err == "benchmarks: error: unknown command 'modell'; did you mean 'model'?\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(importlib.import_module(COMMANDS[command][0]).main)
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"usage: python -m benchmarks {command}" in capsys.readouterr().out


def test_exit_code_and_arguments_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    fake = SimpleNamespace(main=lambda words: seen.append(words) or 1)
    monkeypatch.setattr(importlib, "import_module", lambda name: fake)
    assert main(["compare", "a", "b"]) == 1
    assert seen == [["a", "b"]]


def test_efft_bench_runs_the_checkouts_benchmarks(capfd: pytest.CaptureFixture[str], tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert efft(["bench", "compare", "a", "b"]) == 2
    assert capfd.readouterr().err == (
        "benchmarks compare: error: 'a' is not a file; to compare git revisions add --revisions\n"
    )


def test_efft_bench_outside_a_checkout(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    assert efft(["bench", "ops"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("efft: error: `efft bench` runs the benchmarks of a source checkout, but efft is inst")
    assert str(tmp_path) in message
    assert "pip install -e '.[dev]'" in message
