"""List the runs that a suite needs, and find the runs that can start.

The grid of a method lists the values to try for some of its settings. A point of the grid is one combination of these
values. A search run trains with one point and is evaluated on the validation split. A final run uses the best point and
is evaluated on the test split.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from efft.config import is_number
from efft_lab import typed
from efft_lab.compare.suite import TRIVIAL, Suite, merge_settings
from efft_lab.data import vtab_hyperparameters
from efft_lab.train.config import TrainConfig

#: Fields of ``TrainConfig`` that do not change a result: the place of the data, the number of processes that load data,
#: and how often losses and checkpoints are written.
_PLACES = ("data_root", "workers", "log_every", "checkpoint_every")

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One training run of a suite.

    Attributes:
        task: name of the data set.
        method: name of the method in the tables.
        stage: "search" (the run does not read the test split) or "final".
        seed: seed for all random numbers of the run.
        settings: the point of the grid, which maps names of settings to values.
        config: fields of ``TrainConfig`` for the run. ``method`` may also be the name of a trivial predictor
            (:data:`efft_lab.compare.suite.TRIVIAL`).
    """

    task: str
    method: str
    stage: str
    seed: int
    settings: dict[str, Any]
    config: dict[str, Any]

    @property
    def key(self) -> str:
        """Return a hash of everything that determines the result of the run, as 16 hexadecimal digits."""
        config = {name: value for name, value in self.config.items() if name not in _PLACES}
        parts = [self.task, self.method, self.stage, self.seed, config]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        chosen = ", ".join(
            f"{name}={value:g}" if is_number(value) else f"{name}={value}" for name, value in self.settings.items()
        )
        return f"{self.task}, {self.method}, {self.stage} seed {self.seed}" + (f", {chosen}" if chosen else "")


class Agenda:
    """The runs of a suite.

    The settings of a final run are known only after all search runs of its task and method are finished. Most
    functions of this class therefore need ``done``, which maps the key of each finished run to its result.

    Args:
        suite: the suite.
        methods: names of the methods whose runs may start; by default, all.
        seeds: seeds of the final runs that may start; by default, all.

    Raises:
        ValueError: the settings of a run are invalid (the message names the task, the method and the point of the
            grid), or the suite does not have one of the methods or seeds.
    """

    def __init__(
        self, suite: Suite, methods: Collection[str] | None = None, seeds: Collection[int] | None = None
    ) -> None:
        self.suite = suite
        self.methods = list(suite.methods) if methods is None else list(methods)
        self.seeds = suite.seeds if seeds is None else list(seeds)
        typed.check_names("methods", self.methods, suite.methods, "method")
        if not set(self.seeds) <= set(suite.seeds):
            raise ValueError(f"seeds must be some of the suite's {suite.seeds}, got {self.seeds}")
        self.grids = {name: _points(entry.get("grid", {})) for name, entry in suite.methods.items()}
        self.search_seeds = suite.search_seeds or suite.seeds[:1]
        for task, method in self.pairs():
            for point in self.grids[method]:
                self._check(self._run(task, method, "final", suite.seeds[0], point))

    def __len__(self) -> int:
        finals = sum(len(self.suite.seeds_of(method)) for method in self.grids)
        searches = sum(len(points) * len(self.search_seeds) for points in self.grids.values() if len(points) > 1)
        return len(self.suite.tasks) * (searches + finals)

    def pairs(self) -> list[tuple[str, str]]:
        """Return every pair (task, method), ordered by method.

        If the runs are executed in this order, the first methods can soon be compared on all tasks.
        """
        return [(task, method) for method in self.suite.methods for task in self.suite.tasks]

    def search(self, task: str, method: str) -> list[Run]:
        """Return the search runs of a method on a task. The list is empty without a grid of several points."""
        points = self.grids[method]
        if len(points) == 1:
            return []
        return [self._run(task, method, "search", seed, point) for point in points for seed in self.search_seeds]

    def choose(self, task: str, method: str, done: Mapping[str, Record]) -> dict[str, Any] | None:
        """Return the point of the grid with the best mean validation accuracy.

        The result is None if a search run is not finished yet. If several points have the same accuracy, the first one
        is returned.

        Raises:
            ValueError: training diverged with every point of the grid.
        """
        points, runs = self.grids[method], self.search(task, method)
        if not runs:
            return points[0]
        if any(run.key not in done for run in runs):
            return None
        scores = []
        for point in points:
            of_point = [done[run.key] for run in runs if run.settings == point]
            failed = any(record.get("failed") for record in of_point)
            scores.append(-1.0 if failed else fmean(record["val_accuracy"] for record in of_point))
        if max(scores) < 0:
            raise ValueError(f"every setting in the grid of {method!r} diverged on {task}: give it smaller values")
        return points[scores.index(max(scores))]

    def finals(self, task: str, method: str, done: Mapping[str, Record]) -> list[Run]:
        """Return the final runs, one per seed. The list is empty until all search runs are finished."""
        point = self.choose(task, method, done)
        if point is None:
            return []
        return [self._run(task, method, "final", seed, point) for seed in self.suite.seeds_of(method)]

    def ready(self, done: Mapping[str, Record], started: Collection[str] = ()) -> list[Run]:
        """Return the runs that can start now, in order.

        These runs are neither finished nor in ``started`` (the keys of running runs), and the search runs that they
        depend on are finished.
        """
        runs = []
        for task, method in self.pairs():
            if method in self.methods:
                finals = self.finals(task, method, done)
                runs += [*self.search(task, method), *(run for run in finals if run.seed in self.seeds)]
        return [run for run in runs if run.key not in done and run.key not in started]

    def records(self, done: Mapping[str, Record]) -> list[Record]:
        """Return the results of all finished final runs of this suite."""
        keys = [run.key for task, method in self.pairs() for run in self.finals(task, method, done)]
        return [done[key] for key in keys if key in done]

    def _check(self, run: Run) -> None:
        """Raise an error if the settings of a run are invalid. Otherwise, the error would appear only in the run."""
        trivial = {"method": "linear"} if run.config["method"] in TRIVIAL else {}
        try:
            TrainConfig.from_dict({**run.config, **trivial})
        except ValueError as error:
            of_grid = f", grid {run.settings}" if run.settings else ""
            raise ValueError(f"task {run.task!r}, method {run.method!r}{of_grid}: {error}") from None

    def _run(self, task: str, method: str, stage: str, seed: int, point: dict[str, Any]) -> Run:
        entry = {name: value for name, value in self.suite.methods[method].items() if name not in ("grid", "seeds")}
        variant = entry.pop("vtab_settings", None)
        published = {"efft": vtab_hyperparameters(task, variant)} if variant else {}
        nested: dict[str, Any] = {}
        for name, value in point.items():
            head, _, tail = name.partition(".")
            nested = merge_settings(nested, {head: {tail: value}} if tail else {head: value})
        fixed = {"data": task, "seed": seed, "data_seed": seed, "protocol": "select" if stage == "search" else "final"}
        config = merge_settings(self.suite.train, entry, published, self.suite.tasks[task], nested, fixed)
        return Run(task, method, stage, seed, point, config)


def _points(grid: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
