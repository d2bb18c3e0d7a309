"""Test the command ``efft compare`` on tiny runs.

The tests cover kill and resume, several processes, determinism, failed runs, the linear probe, and the report.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import efft_lab.data
from efft_lab.cli import main
from efft_lab.compare import runner, worker
from efft_lab.compare import suite as suites
from efft_lab.compare.agenda import Agenda
from efft_lab.compare.store import Store, read

ROOT = Path(efft_lab.__file__).parents[1]
Write = Callable[[dict[str, Any]], Path]


def start(*words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT.parent), str(ROOT)])}
    command = [sys.executable, "-m", "efft", "compare", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def children(parent: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find the worker processes")
def test_killed_at_once_it_goes_on_without_losing_or_repeating_a_run(
    tiny: dict[str, Any], write: Write, tmp_path: Path
) -> None:
    file, results = write(tiny), tmp_path / "results.jsonl"
    words = [str(file), "--out", str(results), "--jobs", "2"]
    first = start(*words)
    deadline = time.monotonic() + 240
    while not (results.exists() and results.read_bytes().count(b"\n") >= 3):
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers = children(first.pid)
    assert len(workers) == 2
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    deadline = time.monotonic() + 30
    while any(map(alive, workers)):  # workers must end when their parent dies
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kept = results.read_bytes()
    lines = kept.count(b"\n")
    assert lines < 8
    with open(results, "ab") as broken:
        broken.write(b'{"key": "half a li')  # such a line can remain after a power failure

    second = start(*words)
    output = second.communicate()[0]
    assert second.returncode == 0, output
    assert f"tiny: {8 - lines} of 8 runs to do, 2 at a time" in output
    content = results.read_bytes()
    assert content.startswith(kept)
    assert content.count(b"\n") == 8
    records = read(results)
    agenda = Agenda(suites.load(file))
    assert len(records) == 8
    assert len(agenda.records(records)) == 6
    assert agenda.ready(records) == []
    chosen = agenda.choose("digits", "EFFT2", records)
    best = max((r for r in records.values() if r["stage"] == "search"), key=lambda r: r["val_accuracy"])
    assert chosen == best["settings"]
    for record in records.values():
        assert record["suite"] == "tiny"
        assert record["commit"]
        assert "--jobs 2" in record["command"]
        assert {"python", "torch", "timm"} <= record["versions"].keys()
        assert record["machine"]
        assert record["seconds"] > 0
        assert (record["test_accuracy"] is None) == (record["stage"] == "search")

    third = start(*words)
    assert "0 runs done" in third.communicate()[0]
    assert results.read_bytes() == content


@pytest.mark.slow
def test_same_task_and_seed_give_the_same_numbers(tiny: dict[str, Any]) -> None:
    from efft_lab.compare.suite import Suite

    timing = ("seconds", "cpu_seconds", "images_per_second")
    for run in Agenda(Suite(**tiny)).ready({}):
        if run.seed == 3:
            twice = []
            for _ in range(2):
                worker._load.cache_clear()
                worker._load_features.cache_clear()
                result = worker.execute(run.stage, run.config)
                twice.append({name: value for name, value in result.items() if name not in timing})
            assert twice[0] == twice[1], run


def test_runs_that_fit_are_one_job(tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    from efft_lab.compare.suite import Suite

    tiny |= {"seeds": [3, 4, 5], "tasks": {"digits": {}, "mnist5k": {}}}
    tiny["train"]["checkpoint"] = "backbone.safetensors"
    tiny["methods"]["stochastic"] = {"method": "efft", "lr": 1e-3, "drop_path": 0.1}
    tiny["methods"]["fixed"] = {"method": "efft", "lr": 1e-3}
    ready = Agenda(Suite(**tiny)).ready({})
    jobs = [[(r.task, r.method, r.stage, r.seed) for r in job] for job in runner._jobs(ready, 2)]
    search = [[(task, "EFFT2", "search", 3)] * 2 for task in ("digits", "mnist5k")]
    alone = [
        [(task, method, "final", seed)]
        for method in ("probe", "pixels", "stochastic")
        for task in ("digits", "mnist5k")
        for seed in (3, 4, 5)
    ]
    together = [
        [(task, "fixed", "final", seed) for seed in seeds] for task in ("digits", "mnist5k") for seeds in ((3, 4), (5,))
    ]
    assert jobs == [*search, *alone, *together]
    assert list(runner._jobs(ready, 1)) == [[run] for run in ready]
    runner._show_methods_alone(ready)
    shown = capsys.readouterr().out.splitlines()
    assert [line.partition(": one run at a time, because ")[::2] for line in shown] == [
        ("probe", "method 'linear' does not keep a frozen backbone that models can share"),
        ("pixels", "it trains no model"),
        ("stochastic", "drop_path must be 0, because the models would share its random numbers, got 0.1"),
    ]


def test_runs_trained_together_have_the_results_of_runs_alone(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from efft_lab import backbones
    from efft_lab.compare.suite import Suite

    backbone = backbones.create("test_vit", 10, image_size=32, checkpoint=None, drop_path=0.0, pretrained=False)
    save_file(backbone.state_dict(), tmp_path / "backbone.safetensors")
    tiny["train"]["checkpoint"] = str(tmp_path / "backbone.safetensors")
    tiny["methods"] = {"EFFT2": {"method": "efft", "efft": {"rank": 4, "dropout": 0.2}, "lr": 1e-2}}
    runs = Agenda(Suite(**tiny)).ready({})
    timing = ("seconds", "cpu_seconds", "images_per_second")

    def results(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{name: value for name, value in result.items() if name not in timing} for result in found]

    alone = results([worker.execute(run.stage, run.config) for run in runs])
    together = results(worker.execute_together("final", [run.config for run in runs]))
    for got, expected in zip(together, alone, strict=True):
        assert got.pop("together") == 2
        assert got.pop("train_loss") == pytest.approx(expected.pop("train_loss"), rel=1e-4)
        assert got.pop("test_accuracy") == pytest.approx(expected.pop("test_accuracy"), abs=0.02)
        assert got == expected

    def diverge(*args: Any, **options: Any) -> Any:
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(worker, "run_together", diverge)
    again = results(worker.execute_together("final", [run.config for run in runs]))
    assert again == results([worker.execute(run.stage, run.config) for run in runs])


def test_search_never_reads_the_test_split(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from efft_lab.compare.suite import Suite
    from efft_lab.train import build

    load = build.load_task

    def without_test(config: Any) -> Any:
        task = load(config)

        def refuse(index: int) -> Any:
            raise AssertionError("the test split was read")

        monkeypatch.setattr(task.test, "raw", refuse)
        return task

    worker._load.cache_clear()
    monkeypatch.setattr(build, "load_task", without_test)
    agenda = Agenda(Suite(**tiny))
    for run in agenda.search("digits", "EFFT2"):
        assert worker.execute(run.stage, run.config)["val_accuracy"] > 0
    (final, *_) = agenda.finals("digits", "probe", {})
    with pytest.raises(AssertionError, match="the test split was read"):
        worker.execute(final.stage, final.config)
    worker._load.cache_clear()


def test_probe_on_cached_features_is_the_probe_of_the_trainer(tiny: dict[str, Any], tmp_path: Path) -> None:
    from efft_lab.compare.suite import Suite
    from efft_lab.train import TrainConfig, run

    tiny["train"]["epochs"] = 3
    (planned, *_) = Agenda(Suite(**tiny)).finals("digits", "probe", {})
    fast = worker.execute("final", planned.config)
    slow = run(TrainConfig.from_dict(planned.config), tmp_path / "slow", progress=False).summary
    assert fast["trainable_parameters"] == slow["trainable_parameters"]
    assert fast["head_parameters"] == slow["head_parameters"] == fast["trainable_parameters"]
    assert fast["test_accuracy"] == pytest.approx(slow["test_accuracy"], abs=0.1)  # the random heads differ


@pytest.mark.slow
def test_divergence_is_a_result_and_other_failures_stop(
    tiny: dict[str, Any], write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny["methods"] = {"full": {"method": "full", "grid": {"lr": [1e30, 1e-3]}}, "pixels": {"method": "pixels"}}
    tiny["train"]["log_every"] = 1
    tiny["seeds"] = [0]
    results = tmp_path / "results.jsonl"
    assert main(["compare", str(write(tiny)), "--out", str(results), "--jobs", "2"]) == 0
    by_rate = {r["settings"].get("lr"): r for r in read(results).values() if r["stage"] == "search"}
    assert "the loss is" in by_rate[1e30]["failed"]
    (final,) = (r for r in read(results).values() if r["method"] == "full" and r["stage"] == "final")
    assert final["settings"] == {"lr": 1e-3}

    tiny["train"]["batch_size"] = 100_000
    assert main(["compare", str(write(tiny)), "--out", str(results), "--jobs", "2"]) == 2
    error = capsys.readouterr().err
    assert "digits, full, search seed 0, lr=" in error
    assert ": ValueError: the training split has 800 images, fewer than one batch" in error
    assert "and run the same command again after a fix" in error
    assert "Traceback" in results.with_suffix(".log").read_text()


def test_result_files(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with Store(path) as store:
        store.append({"key": "a"})
        with pytest.raises(RuntimeError, match="another process is adding results to"):
            Store(path)
    path.write_bytes(path.read_bytes() + b'{"key": "b"')
    assert set(read(path)) == {"a"}
    with Store(path) as store:
        store.append({"key": "c"})
    assert path.read_text() == '{"key": "a"}\n{"key": "c"}\n'
    path.write_text('{"key": "a"}\n[3]\n')
    with pytest.raises(ValueError, match=r"r\.jsonl, line 2 is not a result of a run .*; remove that line"):
        Store(path)


@pytest.mark.slow
def test_report(tiny: dict[str, Any], write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny["tasks"] = {"digits": {}, "count": {}}
    tiny["methods"] = {"scratch": {"method": "linear", "pretrained": False}, **tiny["methods"]}
    tiny["reference"] = ["EFFT2", "pixels"]
    file, results = write(tiny), tmp_path / "r.jsonl"
    agenda = Agenda(suites.load(file))
    with Store(results) as store:
        for accuracy, run in enumerate(agenda.ready({})):
            store.append(_record(run, 0.4 + accuracy / 100))
        for run in agenda.ready(store.records):
            elsewhere = {"machine": "n", "gpu": "G", "cpu_seconds": 1800} if run.seed == 3 else {}
            store.append({**_record(run, 0.9 if run.seed == 3 else 0.8), **elsewhere})
    assert main(["compare", str(file), "--out", str(results), "--report"]) == 0
    page = (tmp_path / "r.md").read_text()
    assert "16 of 16 final runs have a result." in page
    assert "| EFFT2 | 85.0 ± 7.1 | 85.0 ± 7.1 |" in page
    assert "| EFFT2 | 1,000 | 85.0 | 85.0 | 85.0 [80.0, 90.0] | 85.0 [80.0, 90.0] |" in page
    of_first, of_second = page.partition("## EFFT2 against the others")[2].split("## pixels against the others")
    assert "| probe | 2 | 4 | +" in of_first, "compared with the reference over two tasks"
    assert "favor pixels" in of_second
    assert "| EFFT2 | 2 | 4 | -" in of_second
    assert "- digits: pixels reaches 52.5, at least as much as probe." in page
    assert "| EFFT2 | lr 0.01 | lr 0.01 |" in page
    assert "- commit: abc" in page
    assert "- machine: n with G: 2 final runs, 1.0 processor hours (EFFT2 2)" in page
    assert "- machine: m: 14 final runs, 0.0 processor hours (scratch 4; EFFT2 2; probe 4; pixels 4)" in page
    assert "![Accuracy against trained parameters](r-parameters.png)" in page
    assert (tmp_path / "r-parameters.png").stat().st_size > 10_000
    assert "Published" not in page
    capsys.readouterr()
    assert main(["compare", str(file), "--out", str(tmp_path / "no.jsonl"), "--report"]) == 2
    assert "no final run of tiny is in" in capsys.readouterr().err


def _record(run: Any, accuracy: float) -> dict[str, Any]:
    facts = {"commit": "abc", "command": "efft", "versions": {"torch": "2"}, "machine": "m", "date": "d"}
    validation = run.settings.get("lr", 0)
    return {
        **{name: getattr(run, name) for name in ("key", "task", "method", "stage", "seed", "settings")},
        **{"test_accuracy": accuracy, "val_accuracy": validation, "group": efft_lab.data.describe(run.task).group},
        **{"trainable_parameters": 1650, "head_parameters": 650, "seconds": 2, **facts},
    }


def test_wrong_words(tiny: dict[str, Any], write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write(tiny))
    for words, message in (
        (
            [],
            "give either a file or --suite, one of hundred_epochs, local, local_efft2, local_grid, local_long, "
            "twelve, vtab1k",
        ),
        ([file, "--suite", "local"], "give either a file or --suite"),
        (["--suite", "nope"], "there is no suite 'nope'"),
        (["--suite", "local", "--quick", "--full"], "either --quick or --full"),
        ([file, "--jobs", "0"], "jobs must be at least 1, got 0"),
    ):
        assert main(["compare", *words]) == 2
        assert message in capsys.readouterr().err
