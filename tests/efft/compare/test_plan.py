"""Suites and plans: what a file means, and what it may not say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import efft.data
from efft.compare import suite as suites
from efft.compare.plan import Plan
from efft.compare.suite import Suite, merged

Write = Callable[[dict[str, Any]], Path]


def record(run: Any, validation: float = 0.5) -> dict[str, Any]:
    return {"key": run.key, "val_accuracy": validation}


def test_search_comes_before_the_final_runs(tiny: dict[str, Any]) -> None:
    plan = Plan(Suite(**tiny))
    first = plan.ready({})
    stages = [(run.method, run.stage, run.seed, run.settings.get("lr")) for run in first]
    assert stages == [
        ("EFFT2", "search", 3, 1e-4), ("EFFT2", "search", 3, 1e-2), ("probe", "final", 3, None),
        ("probe", "final", 4, None), ("pixels", "final", 3, None), ("pixels", "final", 4, None),
    ]  # fmt: skip
    done = {run.key: record(run, 0.5 + run.settings.get("lr", 0)) for run in first}
    second = plan.ready(done)
    assert [(run.method, run.stage, run.seed, run.config["lr"]) for run in second] == [
        ("EFFT2", "final", 3, 1e-2), ("EFFT2", "final", 4, 1e-2),
    ]  # fmt: skip
    assert plan.ready(done, started={second[0].key}) == second[1:]
    assert plan.ready(done | {run.key: record(run) for run in second}) == []
    assert len(plan) == 8 == len(first) + len(second)
    assert len({run.key for run in [*first, *second]}) == 8
    assert {run.config["protocol"] for run in first if run.stage == "search"} == {"select"}
    assert all(run.config["seed"] == run.config["data_seed"] == run.seed for run in [*first, *second])


def test_choice_is_the_best_mean_over_search_seeds_and_the_first_of_equals(tiny: dict[str, Any]) -> None:
    tiny["search_seeds"] = [7, 8]
    plan = Plan(Suite(**tiny))
    runs = plan.search("digits", "EFFT2")
    assert [(run.settings["lr"], run.seed) for run in runs] == [(1e-4, 7), (1e-4, 8), (1e-2, 7), (1e-2, 8)]

    def choice(*validation: float) -> Any:
        done = {run.key: record(run, value) for run, value in zip(runs, validation, strict=False)}
        return plan.chosen("digits", "EFFT2", done)

    assert choice(0.9, 0.1, 0.6, 0.6) == {"lr": 1e-2}
    assert choice(0.5, 0.5, 0.4, 0.6) == {"lr": 1e-4}
    assert choice(0.5, 0.5, 0.4) is None
    done = {run.key: record(run, 0.9) for run in runs}
    done[runs[0].key] = {"failed": "the loss is nan", "val_accuracy": None}
    assert plan.chosen("digits", "EFFT2", done) == {"lr": 1e-2}
    with pytest.raises(ValueError, match="every setting in the grid of 'EFFT2' diverged on digits"):
        plan.chosen("digits", "EFFT2", {run.key: {"failed": "the loss is nan"} for run in runs})


def test_settings_go_over_one_another(tiny: dict[str, Any]) -> None:
    assert merged({"a": 1, "efft": {"x": 1, "y": 1}}, {"a": 2, "efft": {"y": 2}}) == {"a": 2, "efft": {"x": 1, "y": 2}}
    tiny["train"]["efft"] = {"rank": 2, "init": "u"}
    tiny["tasks"]["digits"] = {"lr": 0.5, "efft": {"scale": 3.0}}
    tiny["methods"]["EFFT2"]["grid"] = {"lr": [1e-3, 2e-3], "efft.dropout": [0.0, 0.2]}
    runs = Plan(Suite(**tiny)).search("digits", "EFFT2")
    assert [(r.config["lr"], r.config["efft"]["dropout"]) for r in runs] == [
        (1e-3, 0.0), (1e-3, 0.2), (2e-3, 0.0), (2e-3, 0.2),
    ]  # fmt: skip
    assert runs[0].config["efft"] == {"rank": 4, "init": "u", "scale": 3.0, "dropout": 0.0}


def test_key_depends_on_what_decides_a_result_and_not_on_places(tiny: dict[str, Any]) -> None:
    def key(**changes: Any) -> str:
        tiny["train"] = {**tiny["train"], **changes}
        return Plan(Suite(**tiny)).search("digits", "EFFT2")[0].key

    before = key()
    assert key(data_root="/somewhere", log_every=1) == before
    assert key(epochs=7) != before


def test_published_settings_of_the_paper_by_task() -> None:
    plan = Plan(suites.load("vtab1k"))
    assert len(plan.suite.tasks) == 19
    for task in plan.suite.tasks:
        for method, variant in (("EFFT1", "efft1"), ("EFFT2", "efft2")):
            (run,) = plan.finals(task, method, {})
            given = {name: run.config["efft"][name] for name in ("rank", "scale", "init")}
            assert given == efft.data.vtab_hyperparameters(task, variant)
            assert run.config["efft"].get("variant", "efft2") == variant


def test_local_suite_is_what_it_says() -> None:
    full, quick = Plan(suites.load("local")), Plan(suites.load("local", quick=True))
    tasks = full.suite.tasks
    assert len(tasks) >= 6
    assert {efft.data.describe(task).group for task in tasks} == {"natural", "specialized", "structured"}
    assert not any(efft.data.describe(task).non_commercial for task in tasks)
    assert len(full.suite.seeds) >= 5
    assert len(full.suite.methods) >= 8
    assert quick.suite.name == "local-quick"
    assert len(quick) < len(full) / 8
    assert not {run.key for run in quick.ready({})} & {run.key for run in full.ready({})}


def test_what_the_command_line_gives_goes_over_everything(tiny: dict[str, Any], write: Write) -> None:
    tiny["tasks"]["digits"] = {"epochs": 9}
    plan = Plan(suites.load(write(tiny), train={"epochs": 2}))
    assert {run.config["epochs"] for run in plan.ready({})} == {2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 3}, "unknown field 'epoch' in suite .*tiny.json'; known: about, methods, name"),
        ({"seeds": []}, "suite 'tiny' has no seeds"),
        ({"train": {"epoch": 3}}, "unknown field 'epoch' in train; did you mean 'epochs'?"),
        ({"tasks": {"digits": {"seed": 3}}}, "unknown field 'seed' in task 'digits'"),
        ({"tasks": {"digitz": {}}, "methods": {"x": {"method": "efft", "vtab_settings": "efft1"}}}, "no published"),
        ({"methods": {"x": {"lr": 1}}}, "method 'x' must say which: method = efft, full, ..., or majority"),
        ({"methods": {"x": {"method": "nope"}}}, "method must be one of efft, .*, got 'nope'"),
        ({"methods": {"x": {"method": "full", "grid": {"lr": 1}}}}, "a grid maps a setting to a list of values"),
        ({"reference": "nope"}, "reference must be one of EFFT2, probe, pixels, got 'nope'"),
        ({"quick": {"methods": ["prob"]}}, None),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str | None, tiny: dict[str, Any], write: Write) -> None:
    path = write({**tiny, **change})
    if message is None:
        with pytest.raises(ValueError, match=r"unknown field 'prob' in quick\.methods; did you mean 'probe'"):
            suites.load(path, quick=True)
        return
    with pytest.raises(ValueError, match=message):
        Plan(suites.load(path))


def test_missing_files_and_variants(tiny: dict[str, Any], write: Write) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no suite file nope; the suites by name are local, local_efft2, local_grid, vtab1k"
    ):
        suites.load("nope")
    with pytest.raises(ValueError, match="has no quick variant; leave out --quick"):
        suites.load(write(tiny), quick=True)
    path = write(tiny)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        suites.load(path)
