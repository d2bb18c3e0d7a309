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
    out: Path | None = None,
) -> None:
    """Compare methods on tasks with several seeds. After an interruption, the same command executes the remaining runs.

    Args:
        file: JSON file that describes the comparison; see efft_lab.compare.suite.Suite.
        suite: name of a suite of the library, instead of a file: local (small tasks and a backbone that can be
            downloaded), local_efft2 (the same tasks with variants of EFFT2), local_long (ten epochs, with LoRA for
            comparison), local_grid (a grid of ranks and scales), twelve (twelve tasks, ten epochs, many rivals) or
            vtab1k (the paper's 19 tasks; needs --data).
        quick: run the small variant of the suite.
        full: run the complete suite; required for a suite that has a small variant.
        report: do not run anything; write tables, tests and plots of the existing results next to the result file.
        data: folder with the files of data sets that cannot be downloaded.
        model: backbone to use instead of the suite's.
        checkpoint: file with the weights of the backbone.
        image_size: height and width of the input in pixels, instead of the suite's value.
        epochs: number of passes over the training images, instead of the suite's value.
        batch_size: number of images per update, instead of the suite's value.
        methods: execute only runs of these methods now. A report covers all runs that have results.
        seeds: execute only final runs with these seeds now.
        jobs: number of simultaneous runs; each gets an equal share of the processors.
        out: result file; by default compare_NAME.jsonl (in a source checkout: in benchmarks/results).
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

    count = run(agenda, results, jobs, data)
    print(f"{count} runs done, results in {results}; the same command with --report sums them up")
