"""Test the command that runs benchmarks within a time budget: order and limits of jobs, and jobs that fail or hang."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import experts, fp8_products, generations, gpu, memory, quantized, serve, timeline
from benchmarks.__main__ import COMMANDS, main
from benchmarks.gpu import PARTS, Job, jobs, run_all
from benchmarks.model import run as model_run
from benchmarks.ops import cases
from benchmarks.ops.run import _parser as ops_parser
from benchmarks.scaling import _parser as scaling_parser
from efft_lab.record import read

PARSERS = {
    "ops": ops_parser,
    "model": model_run.parser,
    "memory": memory.parser,
    "serve": serve.parser,
    "quantized": quantized.parser,
    "experts": experts.parser,
    "scaling": scaling_parser,
    "generations": generations.parser,
    "timeline": timeline.parser,
    "fp8-products": fp8_products.parser,
}
ROOT = Path(__file__).parents[2]


def python(name: str, code: str, share: float = 1.0, **fields: Any) -> Job:
    return Job(name, ("-c", code), share, **fields)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_commands_are_ones_that_exist(quick: bool, device: str) -> None:
    seen = set()
    for job in jobs(list(PARTS), device, quick, Path("somewhere")):
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
    names = [job.name for job in jobs(["tests", "speed", "more"], "cuda", False, None)]
    assert names[:5] == [
        "compiled libraries",
        "environment",
        "tests of generation 1",
        "tests of generation 2",
        "tests of generation 3",
    ]
    after = names.index("tests of the ops, other backends") + 1
    assert names[after : after + 7] == [
        "layers, all generations",
        "training step, all generations",
        "inference, batch 8",
        "fp8 products",
        "inference, batch 8, 1000 adapters",
        "layers of ViT-B, bf16",
        "training step of ViT-B, bf16",
    ]
    assert names == [job.name for part in PARTS for job in jobs([part], "cuda", False, None)]
    assert len(set(names)) == len(names)


def test_command_lines_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: "/some/where/compute-sanitizer")
    commands = {job.name: job.command() for job in jobs(["tests"], "cuda", False, None)}
    assert commands["compiled libraries"] == "python -m efft_kernels build --targets cuda"
    for generation in "123":
        variable = f"EFFT_SM90_GENERATION={generation}"
        of_ops = commands[f"tests of generation {generation}"]
        assert of_ops.startswith(f"OMP_NUM_THREADS=1 {variable} python -m pytest tests/efft_kernels/ops -m gpu -k ")
        assert "-k 'not triton and not eager and not reference' -q" in of_ops
        for tool in ("memcheck", "synccheck", "racecheck"):
            assert commands[f"{tool} of generation {generation}"] == (
                f"{variable} compute-sanitizer --tool {tool} --error-exitcode 99 --kernel-name kernel_substring=efft "
                "python tests/csrc/emulation/ragged.py installed 'tiles bfloat16,tiles float16,sums' cuda"
            )
        timeline_of = commands[f"timeline of generation {generation}"]
        assert timeline_of == f"{variable} python -m benchmarks timeline --device cuda"
    assert "-k 'triton or eager or reference' -q" in commands["tests of the ops, other backends"]


def test_only_the_sanitizers_run_at_the_same_time() -> None:
    todo = jobs(["tests"], "cuda", False, None)
    grouped = [job.name.partition(" ")[0] for job in todo if job.group == "sanitizers"]
    assert grouped == 3 * ["memcheck", "synccheck", "racecheck"]
    assert sum(bool(job.group) for job in todo) == 9
    assert not any(job.group for job in jobs(["speed", "more"], "cuda", False, None)), "times must not be disturbed"


def test_cases_of_the_sanitizers_exist() -> None:
    script = (ROOT / "tests/csrc/emulation/ragged.py").read_text()
    families = set(re.findall(r'^    "([a-z0-9 ]+)":', script, re.MULTILINE))
    assert set(gpu._CASES.split(",")) <= families


def test_every_folder_with_tests_for_a_gpu_is_named() -> None:
    """The parametrized devices of a conftest.py count too."""
    marked = [path for path in (ROOT / "tests").rglob("*.py") if re.search(r"\bmark\.gpu", path.read_text())]
    named = [ROOT / folder for folder in (*gpu._OPS, *gpu.OTHER_TESTS)]
    assert len(marked) > 8
    assert not [path for path in marked if not any(path.is_relative_to(folder) for folder in named)]


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
        results=tmp_path,
    )
    assert outcomes["breaks"].text == "failed with exit code 3"
    assert outcomes["hangs"].text.startswith("stopped at its limit of 2 s")
    assert outcomes["runs"].text == "done"
    assert outcomes["accepted"].text == "done"
    assert (tmp_path / "ran").exists()
    time.sleep(max(0.0, 7 - (time.monotonic() - start)))
    assert not (tmp_path / "late").exists(), "the children of a stopped job must end with it"


def test_nothing_starts_once_the_budget_is_used_up(tmp_path: Path) -> None:
    todo = [python("first", "import time; time.sleep(60)"), python("second", "pass")]
    outcomes = run_all(todo, budget=0.5, results=tmp_path)
    assert outcomes["first"].text.startswith("stopped at its limit")
    assert outcomes["second"].text == "not started: the budget is used up"


def test_every_job_leaves_its_output_and_a_result_line(tmp_path: Path) -> None:
    code = "import os, sys; print('one\\ntwo\\n\\nthree', os.environ['CHOSEN']); sys.exit('four')"
    todo = [
        python("first", code, environment={"CHOSEN": "a b"}),
        python("second", "pass", needs=(lambda: None, lambda: "the tool is missing")),
    ]
    assert run_all(todo, budget=60, results=tmp_path)["second"].text == "not run: the tool is missing"
    first, second = read(tmp_path / "gpu.jsonl")
    assert (first["job"], first["outcome"]) == ("first", "failed with exit code 1")
    assert first["last"] == ["two", "three a b", "four"]
    assert first["command"].startswith("'CHOSEN=a b' python -c ")
    assert 0 <= first["wall_s"] <= 60
    assert first.keys() >= {"date", "machine", "versions", "commit"}
    assert (second["job"], second["outcome"], second["last"]) == ("second", "not run: the tool is missing", [])
    log = (tmp_path / "gpu.log").read_text().splitlines()
    assert "[first] three a b" in log
    assert log[-1] == "[second] === not run: the tool is missing"


def test_needs_are_checked_when_it_is_the_turn_of_a_job(tmp_path: Path) -> None:
    made = tmp_path / "made"
    todo = [
        python("makes", f"open({str(made)!r}, 'w')"),
        python("needs", "pass", needs=(lambda: None if made.exists() else "nothing was made",)),
    ]
    assert run_all(todo, budget=60, results=tmp_path)["needs"].text == "done"


def test_jobs_of_a_group_run_at_the_same_time(tmp_path: Path) -> None:
    def meets(name: str, other: str) -> Job:
        code = f"""
import pathlib, time
folder = pathlib.Path({str(tmp_path)!r})
(folder / {name!r}).touch()
while not (folder / {other!r}).exists():
    time.sleep(0.01)
"""
        return python(name, code, group="pair")

    outcomes = run_all([meets("a", "b"), meets("b", "a"), python("alone", "pass")], budget=60, results=tmp_path)
    assert [outcome.text for outcome in outcomes.values()] == ["done", "done", "done"]


def executable(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o755)
    return str(path)


@pytest.mark.parametrize("place", ["path/compute-sanitizer", "cuda/bin/compute-sanitizer", "cuda/compute-sanitizer/x"])
def test_the_sanitizer_is_found_on_the_path_or_beside_nvcc(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert gpu.find_sanitizer() is None
    nvcc = Path(executable(tmp_path / "cuda/bin/nvcc"))
    (tmp_path / "path").mkdir()
    (tmp_path / "path/nvcc").symlink_to(nvcc)
    assert gpu.find_sanitizer() is None
    tool = executable((tmp_path / place).with_name("compute-sanitizer"))
    assert gpu.find_sanitizer() == tool


def test_missing_things_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: None)
    monkeypatch.setattr(gpu, "find", lambda target: None)
    todo = [job for job in jobs(["tests", "speed"], "cuda", False, None) if job.needs]
    outcomes = run_all(todo[1:], budget=60, results=tmp_path)  # without the build
    sanitizer = "not run: compute-sanitizer is neither on the PATH nor in the CUDA toolkit that contains nvcc"
    library = "not run: there is no compiled library for these sources: see the job 'compiled libraries'"
    assert outcomes["memcheck of generation 1"].text == sanitizer
    assert {outcomes[f"tests of generation {g}"].text for g in (1, 2, 3)} == {library}
    assert outcomes["layers, all generations"].text == library
    monkeypatch.setattr(gpu, "find", lambda target: tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert gpu._no_hopper() == "the kernels need compute capability 9.0, and A100 has 8.0"
    assert gpu._no_need_to_build() == "not necessary, because the libraries for these sources exist"


@pytest.mark.parametrize(("code", "expected"), [("pass", 0), ("raise SystemExit(1)", 1)])
def test_exit_code_and_summary(
    code: str, expected: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    chosen = []
    monkeypatch.setattr(gpu, "jobs", lambda parts, *given: chosen.append(parts) or [python("only", code)])
    quick = ["gpu", "--device", "cpu", "--quick", "--results", str(tmp_path)]
    assert main([*quick, "--part", "speed"]) == expected
    assert capsys.readouterr().out.splitlines()[-1].startswith("only")
    assert main(quick) == expected
    assert chosen == [["speed"], ["tests", "speed", "more"]]


def test_wrong_calls_say_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.modules["torch"].cuda, "is_available", lambda: False)
    assert main(["gpu"]) == 2
    assert "no CUDA device; to try the command without a GPU, pass --device cpu --quick" in capsys.readouterr().err
    assert main(["gpu", "--device", "cpu", "--budget", "0"]) == 2
    assert "--budget must be a positive number of seconds, got 0" in capsys.readouterr().err
