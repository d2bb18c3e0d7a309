"""Test suites and agendas: the meaning of a suite file, and errors for invalid content.

A suite file describes a comparison: its tasks, methods and seeds. The agenda of a suite lists its runs. Search runs
choose the settings of a method on a task, and final runs measure the test accuracy with these settings.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import efft_lab.data
from efft_lab.compare import suite as suites
from efft_lab.compare.agenda import Agenda
from efft_lab.compare.store import read
from efft_lab.compare.suite import Suite, merge_settings
from efft_lab.record import RESULTS

Write = Callable[[dict[str, Any]], Path]


def record(run: Any, validation: float = 0.5) -> dict[str, Any]:
    return {"key": run.key, "val_accuracy": validation}


def test_search_comes_before_the_final_runs(tiny: dict[str, Any]) -> None:
    agenda = Agenda(Suite(**tiny))
    first = agenda.ready({})
    stages = [(run.method, run.stage, run.seed, run.settings.get("lr")) for run in first]
    assert stages == [
        ("EFFT2", "search", 3, 1e-4), ("EFFT2", "search", 3, 1e-2), ("probe", "final", 3, None),
        ("probe", "final", 4, None), ("pixels", "final", 3, None), ("pixels", "final", 4, None),
    ]  # fmt: skip
    done = {run.key: record(run, 0.5 + run.settings.get("lr", 0)) for run in first}
    second = agenda.ready(done)
    assert [(run.method, run.stage, run.seed, run.config["lr"]) for run in second] == [
        ("EFFT2", "final", 3, 1e-2), ("EFFT2", "final", 4, 1e-2),
    ]  # fmt: skip
    assert agenda.ready(done, started={second[0].key}) == second[1:]
    assert agenda.ready(done | {run.key: record(run) for run in second}) == []
    assert len(agenda) == 8 == len(first) + len(second)
    assert len({run.key for run in [*first, *second]}) == 8
    assert {run.config["protocol"] for run in first if run.stage == "search"} == {"select"}
    assert all(run.config["seed"] == run.config["data_seed"] == run.seed for run in [*first, *second])


def test_a_method_can_have_fewer_seeds(tiny: dict[str, Any]) -> None:
    everything = {run.key for run in Agenda(Suite(**tiny)).ready({})}
    tiny["methods"]["probe"]["seeds"] = [4]
    agenda = Agenda(Suite(**tiny))
    runs = agenda.ready({})
    assert [(run.stage, run.seed) for run in runs if run.method == "probe"] == [("final", 4)]
    assert len(agenda) == 7
    assert {run.key for run in runs} < everything, "the seeds of a method must not change the keys of its runs"


def test_some_methods_and_seeds_can_go_first(tiny: dict[str, Any]) -> None:
    suite = Suite(**tiny)
    everything = Agenda(suite).ready({})
    some = Agenda(suite, ["EFFT2", "pixels"], [4]).ready({})
    assert [(run.method, run.stage, run.seed) for run in some] == [
        ("EFFT2", "search", 3),
        ("EFFT2", "search", 3),
        ("pixels", "final", 4),
    ]
    assert {run.key for run in some} < {run.key for run in everything}
    with pytest.raises(ValueError, match="unknown method 'EFFT' in methods; did you mean 'EFFT2'"):
        Agenda(suite, ["EFFT"])
    with pytest.raises(ValueError, match=r"seeds must be some of the suite's \[3, 4\], got \[5\]"):
        Agenda(suite, seeds=[5])


def test_choice_is_the_best_mean_over_search_seeds_and_the_first_of_equals(tiny: dict[str, Any]) -> None:
    tiny["search_seeds"] = [7, 8]
    agenda = Agenda(Suite(**tiny))
    runs = agenda.search("digits", "EFFT2")
    assert [(run.settings["lr"], run.seed) for run in runs] == [(1e-4, 7), (1e-4, 8), (1e-2, 7), (1e-2, 8)]

    def choice(*validation: float) -> Any:
        done = {run.key: record(run, value) for run, value in zip(runs, validation, strict=False)}
        return agenda.choose("digits", "EFFT2", done)

    assert choice(0.9, 0.1, 0.6, 0.6) == {"lr": 1e-2}
    assert choice(0.5, 0.5, 0.4, 0.6) == {"lr": 1e-4}
    assert choice(0.5, 0.5, 0.4) is None
    done = {run.key: record(run, 0.9) for run in runs}
    done[runs[0].key] = {"failed": "the loss is nan", "val_accuracy": None}
    assert agenda.choose("digits", "EFFT2", done) == {"lr": 1e-2}
    with pytest.raises(ValueError, match="every setting in the grid of 'EFFT2' diverged on digits"):
        agenda.choose("digits", "EFFT2", {run.key: {"failed": "the loss is nan"} for run in runs})


def test_settings_go_over_one_another(tiny: dict[str, Any]) -> None:
    assert merge_settings({"a": 1, "efft": {"x": 1, "y": 1}}, {"a": 2, "efft": {"y": 2}}) == {
        "a": 2,
        "efft": {"x": 1, "y": 2},
    }
    tiny["train"]["efft"] = {"rank": 2, "init": "u"}
    tiny["tasks"]["digits"] = {"lr": 0.5, "efft": {"scale": 3.0}}
    tiny["methods"]["EFFT2"]["grid"] = {"lr": [1e-3, 2e-3], "efft.dropout": [0.0, 0.2]}
    runs = Agenda(Suite(**tiny)).search("digits", "EFFT2")
    assert [(r.config["lr"], r.config["efft"]["dropout"]) for r in runs] == [
        (1e-3, 0.0), (1e-3, 0.2), (2e-3, 0.0), (2e-3, 0.2),
    ]  # fmt: skip
    assert runs[0].config["efft"] == {"rank": 4, "init": "u", "scale": 3.0, "dropout": 0.0}


def test_key_depends_on_what_decides_a_result_and_not_on_places(tiny: dict[str, Any]) -> None:
    def key(**changes: Any) -> str:
        tiny["train"] = {**tiny["train"], **changes}
        return Agenda(Suite(**tiny)).search("digits", "EFFT2")[0].key

    before = key()
    assert key(data_root="/somewhere", log_every=1) == before
    assert key(epochs=7) != before


def test_published_settings_of_the_paper_by_task() -> None:
    agenda = Agenda(suites.load("vtab1k"))
    assert len(agenda.suite.tasks) == 19
    for task in agenda.suite.tasks:
        for method, variant in (("EFFT1", "efft1"), ("EFFT2", "efft2")):
            (run,) = agenda.finals(task, method, {})
            given = {name: run.config["efft"][name] for name in ("rank", "scale", "init")}
            assert given == efft_lab.data.vtab_hyperparameters(task, variant)
            assert run.config["efft"].get("variant", "efft2") == variant


@pytest.mark.parametrize("name", ["local", "local_efft2", "local_long", "twelve"])
def test_results_on_record_are_of_their_suite(name: str) -> None:
    """A suite may get new methods, but its recorded runs must remain a part of the suite."""
    done = read(RESULTS / f"compare_{name}.jsonl")
    agenda = Agenda(suites.load(name))
    runs = [run for pair in agenda.pairs() for run in [*agenda.search(*pair), *agenda.finals(*pair, done)]]
    assert done
    assert set(done) <= {run.key for run in runs}


def test_scales_and_ranks_that_training_finds_are_compared() -> None:
    agenda = Agenda(suites.load("local_efft2"))
    settings = [agenda.finals("count", method, {})[0].config for method in agenda.suite.methods if "auto" in method]
    assert [run["efft"].get("trainable_scale") for run in settings] == [None, "global", "group", "matrix", None]
    assert [run.get("prune_at") for run in settings] == [None] * 4 + [1]


def test_local_suite_is_what_it_says() -> None:
    full, quick = Agenda(suites.load("local")), Agenda(suites.load("local", quick=True))
    tasks = full.suite.tasks
    assert len(tasks) >= 6
    assert {efft_lab.data.describe(task).group for task in tasks} == {"natural", "specialized", "structured"}
    assert not any(efft_lab.data.describe(task).non_commercial for task in tasks)
    assert len(full.suite.seeds) >= 5
    assert len(full.suite.methods) >= 8
    assert quick.suite.name == "local-quick"
    assert len(quick) < len(full) / 8
    assert not {run.key for run in quick.ready({})} & {run.key for run in full.ready({})}


def test_what_the_command_line_gives_goes_over_everything(tiny: dict[str, Any], write: Write) -> None:
    tiny["tasks"]["digits"] = {"epochs": 9}
    agenda = Agenda(suites.load(write(tiny), train={"epochs": 2}))
    assert {run.config["epochs"] for run in agenda.ready({})} == {2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 3}, "unknown field 'epoch' in suite .*tiny.json'; known: about, methods, name"),
        ({"seeds": []}, "suite 'tiny' has no seeds"),
        ({"train": {"epoch": 3}}, "unknown field 'epoch' in train; did you mean 'epochs'?"),
        ({"tasks": {"digits": {"seed": 3}}}, "unknown field 'seed' in task 'digits'"),
        ({"tasks": {"digits": {}}, "methods": {"x": {"method": "efft", "vtab_settings": "efft1"}}}, "no published"),
        (
            {"methods": {"x": {"lr": 1}}},
            "method 'x' lacks the entry 'method', such as efft or full, or one of majority",
        ),
        ({"methods": {"x": {"method": "nope"}}}, "method must be one of efft, .*, got 'nope'"),
        ({"methods": {"x": {"method": "full", "grid": {"lr": 1}}}}, "a grid maps a setting to a list of values"),
        ({"reference": "nope"}, "unknown method 'nope' in reference; known: EFFT2, probe, pixels"),
        # values of the wrong type
        ({"name": "../x"}, r"name must begin with a letter or digit and have no slash, got '\.\./x'"),
        ({"about": 3}, "about must be a string, got 3"),
        ({"tasks": ["digits"]}, r"tasks must be an object, got \['digits'\]"),
        ({"tasks": {"digits": 3}}, "task 'digits' must be an object, got 3"),
        ({"methods": []}, r"methods must be an object, got \[\]"),
        ({"methods": {"x": "efft"}}, "method 'x' must be an object, got 'efft'"),
        ({"methods": {"x": {"method": ["efft"]}}}, r"method must be a string, got \['efft'\]"),
        ({"methods": {"x": {"method": "full", "vtab_settings": 3}}}, "method 'x', vtab_settings must be one of efft1"),
        ({"train": [1]}, r"train must be an object, got \[1\]"),
        ({"train": {"efft": 3}}, "task 'digits', method '.*': efft must be an object, got 3"),
        ({"train": {"lr": "1"}}, "task 'digits', method 'EFFT2', .*: lr must be a number, got '1'|must be a number"),
        ({"quick": 3}, "quick must be an object, got 3"),
        ({"quick": {"tasks": "digits"}}, "quick.tasks must be a list, each entry a string, got 'digits'"),
        ({"quick": {"methods": ["prob"]}}, "unknown method 'prob' in quick.methods; did you mean 'probe'"),
        ({"quick": {"seed": [1]}}, "unknown field 'seed' in quick; did you mean 'seeds'"),
        ({"quick": {"seeds": [1, 1]}}, "quick: seeds must be distinct integers >= 0"),
        # tasks and seeds
        (
            {"tasks": {"digitz": {}}},
            "tasks: 'digitz' is not a known task .*digits.*, nor is there a folder",
        ),
        ({"seeds": 3}, "seeds must be a list, each entry an integer, got 3"),
        ({"seeds": [0, 1.5]}, r"seeds must be a list, each entry an integer, got \[0, 1.5\]"),
        ({"seeds": [0, True]}, "seeds must be a list, each entry an integer"),
        ({"seeds": [0, -1]}, r"seeds must be distinct integers >= 0, got \[0, -1\]"),
        ({"seeds": [3, 4, 3]}, r"seeds must be distinct integers >= 0, got \[3, 4, 3\]"),
        ({"methods": {"x": {"method": "full", "seeds": 3}}}, "method 'x', seeds must be a list, each entry an integer"),
        (
            {"methods": {"x": {"method": "full", "seeds": [5]}}},
            r"seeds must be some of the suite's \[3, 4\], got \[5\]",
        ),
        ({"search_seeds": [3, 3]}, r"search_seeds must be distinct integers >= 0, got \[3, 3\]"),
        ({"search_seeds": "3"}, "search_seeds must be a list, each entry an integer, got '3'"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str, tiny: dict[str, Any], write: Write) -> None:
    path = write({**tiny, **change})
    with pytest.raises(ValueError, match=message):
        Agenda(suites.load(path))


@pytest.mark.parametrize(
    ("method", "grid", "message"),
    [
        ("efft", 3, "method 'x', grid must be an object, got 3"),
        ("efft", {"lrr": [1]}, "unknown setting 'lrr' in method 'x', grid; did you mean 'lr'"),
        ("efft", {"seed": [1]}, "unknown setting 'seed' in method 'x', grid"),
        ("efft", {"eft.scale": [1]}, "unknown group of settings 'eft' in method 'x', grid; did you mean 'efft'"),
        ("efft", {"efft.scal": [1]}, r"unknown setting 'scal' in method 'x', grid \(efft\.\); did you mean 'scale'"),
        (
            "efft",
            {"adapter.scale": [1]},
            "'adapter.scale' is not read by method 'efft'; the names of its settings begin with 'efft.'",
        ),
        (
            "fact_tt",
            {"efft.scale": [1]},
            "'efft.scale' is not read by method 'fact_tt'; the names of its settings begin with 'adapter.'",
        ),
        ("vera", {"adapter.d_init": [1]}, r"unknown setting 'd_init' in .*\(adapter\.\); did you mean 'd_initial'"),
        ("peft_lora", {"adapter.rnk": [1]}, r"unknown setting 'rnk' in .*\(adapter\.\); did you mean 'rank'"),
        ("full", {"adapter.rank": [1]}, r"unknown setting 'rank' in method 'x', grid \(adapter\.\); known: none"),
        ("knn", {"lr": [1]}, "method 'x' has a grid, but 'knn' has no settings"),
        ("efft", {"lr": []}, "a grid maps a setting to a list of values"),
        ("efft", {"lr": [1, 2, 1]}, "method 'x', grid 'lr' has a value twice"),
        ("efft", {"lr": list(range(1, 50)), "epochs": list(range(1, 50))}, "the grid has 2401 combinations, expected"),
        ("efft", {"lr": [1, "2"]}, "task 'digits', method 'x', grid {'lr': '2'}: lr must be a number, got '2'"),
        ("efft", {"epochs": [1.5]}, "task 'digits', method 'x', grid {'epochs': 1.5}: epochs must be an integer"),
        ("efft", {"efft.rank": [4, "4"]}, "task 'digits', method 'x', grid .*: EfftConfig.rank must be an integer"),
        ("vera", {"adapter.rank": [4, 0]}, "task 'digits', method 'x', grid .*: VeRAConfig.rank must be an integer"),
        ("peft_lora", {"adapter.rank": ["4"]}, "grid .*: rank of method 'peft_lora' must be an integer, got '4'"),
        ("vpt_deep", {"adapter.tokens": [0]}, "grid .*: tokens of method 'vpt_deep' must be at least 1, got 0"),
    ],
)
def test_mistakes_in_a_grid_are_named(method: str, grid: Any, message: str, tiny: dict[str, Any], write: Write) -> None:
    tiny["methods"] = {"x": {"method": method, "grid": grid}}
    with pytest.raises(ValueError, match=message):
        Agenda(suites.load(write(tiny)))


def test_points_of_a_grid_that_are_no_numbers_can_be_shown(tiny: dict[str, Any]) -> None:
    tiny["methods"] = {
        "x": {"method": "efft", "grid": {"efft.variant": ["efft1", "efft2"], "pretrained": [True, False]}}
    }
    shown = str(Agenda(Suite(**tiny)).search("digits", "x")[0])
    assert shown == "digits, x, search seed 3, efft.variant=efft1, pretrained=True"


def test_missing_files_and_variants(tiny: dict[str, Any], write: Write) -> None:
    names = "hundred_epochs, local, local_efft2, local_grid, local_long, twelve, vtab1k"
    with pytest.raises(FileNotFoundError, match=f"no suite file 'nope'; the suites by name are {names}"):
        suites.load("nope")
    with pytest.raises(ValueError, match="has no quick variant; leave out --quick"):
        suites.load(write(tiny), quick=True)
    path = write(tiny)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        suites.load(path)
