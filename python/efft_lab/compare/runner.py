"""Execute the runs of an agenda that have no result yet. Several runs are executed at the same time.

A worker is a separate process that executes one job after the other. A job is one run, or several runs of one method
that are trained together. The results of a job are written to the result file immediately.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import IO, Any

import efft_kernels
import efft_lab
from efft_lab.compare.agenda import Agenda, Run
from efft_lab.compare.store import Store
from efft_lab.compare.suite import TRIVIAL
from efft_lab.record import cores, machine_facts, now
from efft_lab.train.config import TrainConfig
from efft_lab.train.together import reason_against


class Worker:
    """Start a process of :mod:`efft_lab.compare.worker`, and send runs to it.

    Args:
        threads: number of threads of the process.
        log: file for the warnings and tracebacks of the process.
        answers: queue that receives a pair (this object, answer) for each answer of the process. When the process has
            ended, the queue receives (this object, None).
    """

    def __init__(self, threads: int, log: IO[bytes], answers: queue.SimpleQueue[Any]) -> None:
        roots = [str(Path(str(package.__file__)).parents[1]) for package in (efft_lab, efft_kernels)]
        path = os.pathsep.join([*roots, *filter(None, [os.environ.get("PYTHONPATH")])])
        limits = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "efft_lab.compare.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "PYTHONPATH": path, **limits},
            text=True,
        )
        self.runs: list[Run] = []
        threading.Thread(target=self._listen, args=(answers,), daemon=True).start()

    def _listen(self, answers: queue.SimpleQueue[Any]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            answers.put((self, json.loads(line)))
        answers.put((self, None))

    def start(self, runs: list[Run], places: dict[str, Any]) -> None:
        """Send a job to the process. ``places`` overrides fields of the configurations for storage locations."""
        assert self.process.stdin is not None
        self.runs = runs
        configs = [{**run.config, **places} for run in runs]
        job = {"name": "; ".join(map(str, runs)), "stage": runs[0].stage, "configs": configs}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()

    def stop(self) -> None:
        """Terminate the process immediately."""
        self.process.kill()
        self.process.wait()


def compare(agenda: Agenda, results: Path, jobs: int = 1, data_root: str | None = None, together: int = 1) -> int:
    """Execute the runs that have no result yet.

    The process can be killed at any moment. The same call then continues the comparison. It executes only runs that
    were not finished.

    Args:
        agenda: the runs.
        results: the result file in JSON lines. A log file is written next to the result file.
        jobs: number of simultaneous jobs. Each gets an equal share of the processors.
        data_root: folder with the files of the data sets.
        together: the largest number of runs in a job. Runs are trained together if they train the same method on the
            same task and differ only in seeds, learning rates and weight decays (:mod:`efft_lab.train.together`).

    Returns:
        The number of executed runs.

    Raises:
        ValueError: ``jobs`` or ``together`` is less than 1, a line of the result file is damaged, or training diverged
            with every setting in a grid.
        RuntimeError: a run failed for a reason other than divergence, or another process writes to the result file.
    """
    for name, value in (("jobs", jobs), ("together", together)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    threads = max(cores() // jobs, 1)
    places = {} if data_root is None else {"data_root": data_root}
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    workers: list[Worker] = []
    with Store(results) as store, open(results.with_suffix(".log"), "ab") as log:
        progress = Progress(agenda, store, jobs)
        if together > 1:
            _show_methods_alone(agenda.ready(store.records))
        common = {"suite": agenda.suite.name, **machine_facts(threads), "jobs": jobs, "threads": threads}
        error: str | None = None
        try:
            while True:
                busy = [worker for worker in workers if worker.runs]
                started = {run.key for worker in busy for run in worker.runs}
                ready = agenda.ready(store.records, started) if error is None else []
                for runs in itertools.islice(_jobs(ready, together), jobs - len(busy)):
                    idle = next((worker for worker in workers if not worker.runs), None)
                    if idle is None:
                        workers.append(idle := Worker(threads, log, answers))
                    idle.start(runs, places)
                    busy.append(idle)
                if not busy:
                    break
                worker, answer = answers.get()
                runs, worker.runs = worker.runs, []
                if answer is not None and "results" in answer:
                    for run, result in zip(runs, answer["results"], strict=True):
                        record = _record(run, result, common)
                        store.append(record)
                        progress.show(run, record)
                elif error is None:  # no job starts after an error, but the results of the other processes are saved
                    what = "; ".join(map(str, runs))
                    error = (
                        f"{what}: {_reason(worker, answer)}; see {log.name}, and run the same command again after a fix"
                    )
                    log.write(((answer or {}).get("trace") or "").encode())
                    if answer is None:
                        workers.remove(worker)
        finally:
            for worker in workers:
                worker.stop()
    if error is not None:
        raise RuntimeError(error)
    return progress.count


def _jobs(runs: Sequence[Run], most: int) -> Iterator[list[Run]]:
    """Divide runs into jobs of at most ``most`` runs, in the order of the first run of each job.

    A job is found only when it is asked for, because finding the runs of a job takes time.
    """
    left = list(runs)
    while left:
        job = left[:1]
        for run in left[1:]:
            if len(job) < most and _fit(job[0], run):
                job.append(run)
        yield job
        left = [run for run in left if run not in job]


def _fit(run: Run, other: Run) -> bool:
    """Return whether two runs can be trained together."""
    same = all(getattr(run, name) == getattr(other, name) for name in ("task", "method", "stage"))
    return same and _why_alone(run, other) is None


def _why_alone(*runs: Run) -> str | None:
    """Return why runs cannot be trained together, or None if they can."""
    if runs[0].config["method"] in TRIVIAL:
        return "it trains no model"
    return reason_against([TrainConfig.from_dict(run.config) for run in runs])


def _show_methods_alone(runs: Sequence[Run]) -> None:
    """Print a line for each method whose runs cannot be trained together."""
    first: dict[str, Run] = {}
    for run in runs:
        first.setdefault(run.method, run)
    for method, run in first.items():
        reason = _why_alone(run)
        if reason is not None:
            print(f"{method}: one run at a time, because {reason}", flush=True)


def _record(run: Run, result: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
    identity = {name: getattr(run, name) for name in ("key", "task", "method", "stage", "seed", "settings")}
    return {**identity, **result, **common, "date": now()}


def _reason(worker: Worker, answer: dict[str, Any] | None) -> str:
    if answer is None:
        return f"the process ended with exit code {worker.process.wait()} (-9: killed, often for lack of memory)"
    return str(answer["error"])


class Progress:
    """Print one line per finished run with an estimate of the remaining time."""

    def __init__(self, agenda: Agenda, store: Store, jobs: int) -> None:
        self.agenda, self.store, self.jobs = agenda, store, jobs
        self.count, self.started = 0, time.perf_counter()
        left = len(agenda) - self._done()
        print(f"{agenda.suite.name}: {left} of {len(agenda)} runs to do, {jobs} at a time", flush=True)

    def _done(self) -> int:
        keys: set[str] = set()
        for task, method in self.agenda.pairs():
            runs = [*self.agenda.search(task, method), *self.agenda.finals(task, method, self.store.records)]
            keys |= {run.key for run in runs}
        return len(keys & self.store.records.keys())

    def show(self, run: Run, record: dict[str, Any]) -> None:
        """Print one line about a finished run."""
        self.count += 1
        names = {"search": ("validation", "val_accuracy"), "final": ("test", "test_accuracy")}
        word, field = names[run.stage]
        outcome = record.get("failed") or f"{word} {record[field]:.1%}"
        done = f"[{self._done()}/{len(self.agenda)}]"
        print(f"{done} {run}: {outcome}, {record['seconds']:.0f} s; {self._left()} left", flush=True)

    def _left(self) -> str:
        """Estimate the remaining time of the suite.

        The time of a remaining run is estimated as the mean time of the finished runs of the same method and stage. If
        there are none, it is estimated as the mean time of all finished runs.
        """
        seconds: dict[Any, list[float]] = defaultdict(list)
        count: dict[Any, int] = defaultdict(int)
        for record in self.store.records.values():
            kind = (record["method"], record["stage"])
            seconds[kind].append(record["seconds"])
            count[kind] += 1
        suite, overall = self.agenda.suite, fmean(s for values in seconds.values() for s in values)
        total = 0.0
        for method, points in self.agenda.grids.items():
            searches = len(points) * len(self.agenda.search_seeds) if len(points) > 1 else 0
            for stage, each in (("search", searches), ("final", len(suite.seeds_of(method)))):
                kind = (method, stage)
                mean = fmean(seconds[kind]) if seconds[kind] else overall
                total += max(each * len(suite.tasks) - count[kind], 0) * mean
        return str(datetime.timedelta(seconds=round(total / self.jobs)))
