"""Test the command that runs benchmarks within a time budget: order and limits of jobs, and jobs that fail or hang."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from benchmarks import experts, gpu, memory, quantized, serve
from benchmarks.__main__ import COMMANDS, main
from benchmarks.gpu import Job, jobs, run_all
from benchmarks.model import run as model_run
from benchmarks.ops import cases
from benchmarks.ops.run import _parser as ops_parser
from benchmarks.scaling import _parser as scaling_parser

PARSERS = {
    "ops": ops_parser,
    "model": model_run.parser,
    "memory": memory.parser,
    "serve": serve.parser,
    "quantized": quantized.parser,
    "experts": experts.parser,
    "scaling": scaling_parser,
}


def python(name: str, code: str, share: float = 1.0) -> Job:
    return Job(name, ("-c", code), share)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_commands_are_ones_that_exist(quick: bool, device: str) -> None:
    seen = set()
    for job in jobs(device, quick, Path("somewhere")):
        if job.arguments[:2] != ("-m", "benchmarks"):
            continue
        _, _, command, *options = job.arguments
        assert command in COMMANDS
        args = PARSERS[command]().parse_args(options)
        assert args.device == device
        assert args.results == Path("somewhere")
        if command == "ops":
            assert cases.select("full", model=args.model, images=args.images, rank=args.rank, dtype=args.dtype)
        seen.add(command)
    assert seen == set(PARSERS)


def test_tests_come_first_then_what_matters_most() -> None:
    names = [job.name for job in jobs("cuda", False, None)]
    assert names[:7] == [
        "compiled extension",
        "environment",
        "GPU tests",
        "layers of ViT-B, bf16",
        "training step of ViT-B, bf16",
        "training step of ViT-B, bf16, CUDA graphs",
        "memory of ViT-B, bf16",
    ]


def test_a_job_that_fails_or_hangs_does_not_keep_the_next_from_running(tmp_path: Path) -> None:
    outlives = f"import time, pathlib; time.sleep(4); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    hangs = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {outlives!r}]); time.sleep(60)"
    start = time.monotonic()
    outcomes = run_all(
        [
            python("breaks", "raise SystemExit(3)"),
            python("hangs", hangs, share=0.05),
            python("runs", f"open({str(tmp_path / 'ran')!r}, 'w')"),
            Job("accepted", ("-c", "raise SystemExit(5)"), 1.0, fine=(0, 5)),
        ],
        budget=40,
    )
    assert outcomes["breaks"].startswith("failed with exit code 3")
    assert outcomes["hangs"].startswith("stopped at its limit of 2 s")
    assert outcomes["runs"].startswith("done")
    assert outcomes["accepted"].startswith("done")
    assert (tmp_path / "ran").exists()
    time.sleep(max(0.0, 7 - (time.monotonic() - start)))
    assert not (tmp_path / "late").exists(), "the children of a stopped job must end with it"


def test_nothing_starts_once_the_budget_is_used_up() -> None:
    outcomes = run_all([python("first", "import time; time.sleep(60)"), python("second", "pass")], budget=0.5)
    assert outcomes["first"].startswith("stopped at its limit")
    assert outcomes["second"] == "not started: the budget is used up"


@pytest.mark.parametrize(("code", "expected"), [("pass", 0), ("raise SystemExit(1)", 1)])
def test_exit_code_and_summary(
    code: str, expected: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "jobs", lambda device, quick, results: [python("only", code)])
    assert main(["gpu", "--device", "cpu", "--quick"]) == expected
    assert capsys.readouterr().out.splitlines()[-1].startswith("only")


def test_wrong_calls_say_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.modules["torch"].cuda, "is_available", lambda: False)
    assert main(["gpu"]) == 2
    assert "no CUDA device; to try the command without a GPU, pass --device cpu --quick" in capsys.readouterr().err
    assert main(["gpu", "--device", "cpu", "--budget", "0"]) == 2
    assert "--budget must be a positive number of seconds, got 0" in capsys.readouterr().err
