"""Implement ``efft compare``, which runs a suite or reports its results."""

from pathlib import Path
from typing import Any

import tyro

from efft_lab.cli.bench import ROOT


def compare(
    file: tyro.conf.Positional[Path | None] = None,
    /,
    suite: str | None = None,
    quick: bool = False,
    full: bool = False,
    report: bool = False,
    data: str | None = None,
    model: str | None = None,
    checkpoint: str | None = None,
    image_size: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    methods: list[str] | None = None,
    seeds: list[int] | None = None,
    jobs: int = 1,
    together: int = 1,
    out: Path | None = None,
) -> None:
    """Compare methods on tasks with several seeds. After an interruption, the same command executes the remaining runs.

    A suite is the description of a comparison: its tasks, methods, seeds and settings. Search runs choose the settings
    of a method on the validation split. Final runs use the chosen settings and are tested.

    Args:
        file: JSON file with the suite; the docstring of efft_lab.compare.suite.Suite describes its fields.
        suite: name of a suite of this package, instead of a file. Choose local (six small tasks, fifteen methods),
            local_efft2 (the same tasks with variants of EFFT2), local_long (the same tasks with EFFT2 and LoRA, ten
            epochs instead of three), local_grid (three tasks with a grid of ranks and scales), twelve (twelve small
            tasks, ten epochs), hundred_epochs (three of these tasks with the training recipe of the EFFT paper) or
            vtab1k (the paper's 19 tasks; their files must be in the folder --data).
        quick: run the small variant of the suite.
        full: run the complete suite. This is also the default.
        report: do not run anything, but write tables, tests and plots of the existing results next to the result file.
        data: folder with the files of data sets that cannot be downloaded.
        model: name of the backbone, instead of the suite's backbone.
        checkpoint: file with the weights of the backbone.
        image_size: height and width of the input in pixels, instead of the suite's value.
        epochs: number of passes over the training images, instead of the suite's value.
        batch_size: number of images per update, instead of the suite's value.
        methods: names of methods in the suite. Only their runs are executed now. A report still covers all methods.
        seeds: seeds of the suite. Only the final runs with these seeds, and all search runs, are executed now.
        jobs: number of simultaneous jobs; each gets an equal share of the processors. A job is one run, or several runs
            that are trained together.
        together: train up to this many runs in one pass through their common backbone. These runs must have the same
            method and task and may differ only in seeds, learning rates and weight decays. Only methods of efft.methods
            can do this, and not with stochastic depth. It saves time on a GPU that a single run does not fill.
        out: result file; by default, compare_NAME.jsonl in benchmarks/results (in a source checkout) or in the current
            folder (otherwise).
    """
    from efft_lab.compare import suite as suites
    from efft_lab.compare.agenda import Agenda

    if (file is None) == (suite is None):
        raise ValueError(f"give either a file or --suite, one of {', '.join(suites.names())}")
    if suite is not None and suite not in suites.names():
        raise ValueError(f"there is no suite {suite!r}; the suites are {', '.join(suites.names())}")
    if quick and full:
        raise ValueError("give either --quick or --full, not both")
    given: dict[str, Any] = {"model": model, "checkpoint": checkpoint, "image_size": image_size}
    given |= {"epochs": epochs, "batch_size": batch_size}
    train = {name: value for name, value in given.items() if value is not None}
    chosen = suites.load(file or str(suite), quick, train)
    agenda = Agenda(chosen, methods, seeds)
    folder = ROOT / "benchmarks" / "results"
    results = out or (folder if folder.is_dir() else Path()) / f"compare_{chosen.name}.jsonl"
    if report:
        from efft_lab.compare.report import write

        for path in write(agenda, results):
            print(f"wrote {path}")
        return
    from efft_lab.compare.runner import compare as run

    count = run(agenda, results, jobs, data, together)
    print(f"{count} runs done, results in {results}; the same command with --report summarizes them")
