"""``efft compare``: which suite is run or reported, and where its results are."""

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
    jobs: int = 1,
    out: Path | None = None,
) -> None:
    """Compare methods side by side: tasks x methods x seeds. After an interruption, the same command does what is left.

    Args:
        file: JSON file that says what is compared; see efft_lab.compare.suite.Suite.
        suite: a suite of the library instead of a file: local (small tasks and a backbone that can be fetched),
            local_efft2 (the same tasks, variants of EFFT2), local_long (ten epochs, beside LoRA), local_grid (rank
            against scale) or vtab1k (the paper's 19 tasks; needs --data).
        quick: the small variant of a suite.
        full: the whole of a suite that has a small variant.
        report: run nothing; write tables, tests and pictures of the existing results, beside them.
        data: folder with the data sets' files, for tasks that cannot be fetched.
        model: backbone to use instead of the suite's.
        checkpoint: file with its weights.
        image_size: input height and width in pixels, instead of the suite's.
        epochs: passes over the training images, instead of the suite's.
        batch_size: images per update, instead of the suite's.
        jobs: number of simultaneous runs; each gets an equal share of the processors.
        out: result file; by default compare_NAME.jsonl, in a source checkout in benchmarks/results.
    """
    from efft_lab.compare import suite as suites
    from efft_lab.compare.agenda import Agenda

    if (file is None) == (suite is None):
        raise ValueError(f"give either a file or --suite, one of {', '.join(suites.names())}")
    if suite is not None and suite not in suites.names():
        raise ValueError(f"there is no suite {suite!r}; there are {', '.join(suites.names())}")
    if quick and full:
        raise ValueError("give either --quick or --full, not both")
    given: dict[str, Any] = {"model": model, "checkpoint": checkpoint, "image_size": image_size}
    given |= {"epochs": epochs, "batch_size": batch_size}
    train = {name: value for name, value in given.items() if value is not None}
    chosen = suites.load(file or str(suite), quick, train)
    agenda = Agenda(chosen)
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
