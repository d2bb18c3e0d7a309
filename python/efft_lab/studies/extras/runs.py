"""Run settings in stacks, in several processes, until the time is over."""

from __future__ import annotations

import dataclasses
import json
import math
import queue
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from efft_lab.record import machine_facts
from efft_lab.studies.extras.packed import Packed
from efft_lab.studies.extras.variants import Run, Variant, config_of, kind_of, recipe, start_of
from efft_lab.studies.stacked import Stack, Start
from efft_lab.train.build import EpochBatches

#: The images on which each stage trains.
ROLES = {"explore": "explore", "search": "train", "final": "trainval"}


def batches_of(runs: Sequence[Run], packed: Packed, epochs: int, batch: int) -> Tensor:
    """Return the positions of each step's images, in the trainer's order, [steps, K, batch]."""
    found = []
    for run in runs:
        images = packed.roles[run.task, f"{ROLES[run.stage]}/{run.seed}"]
        order = EpochBatches(len(images), batch, run.seed)
        rows = []
        for epoch in range(epochs):
            order.start(epoch)
            rows += list(order)
        found.append(images[torch.tensor(rows)])
    return torch.stack(found, 1)


def train_stack(
    runs: Sequence[Run],
    packed: Packed,
    fields: Mapping[str, Any],
    device: torch.device | str,
    graph: bool = False,
    due: Any = lambda: False,
    starts: dict[Any, Start] | None = None,
) -> list[dict[str, Any]]:
    """Train runs of one structure and stage and return their rows, or no rows if the time ran out before they ended."""
    clock = time.perf_counter()
    variant = runs[0].variant
    starts = {} if starts is None else starts
    own: list[Start] = []
    for run in runs:
        key = run.variant.key(), run.seed
        if key not in starts:
            starts[key] = start_of(run.variant, run.seed, packed.base, fields)
        start = starts[key]
        own.append(dataclasses.replace(start, parameters={**start.parameters, **packed.head(run.task, run.seed)}))
    batch = int(fields["batch_size"])
    config = config_of(variant, runs[0].seed, fields)
    batches = batches_of(runs, packed, variant.epochs, batch)
    kinds = {
        name: kind
        for name in own[0].parameters
        if (kind := kind_of(name, variant)) and any(run.variant.rate(kind) for run in runs)
    }
    rates = [{kind: run.variant.rate(kind) for kind in kinds.values()} for run in runs]
    classes = [packed.classes[run.task] for run in runs]
    stack = Stack(
        own,
        classes,
        kinds,
        rates,
        batches,
        packed.pixels,
        packed.labels,
        config,
        len(batches) // variant.epochs,
        variant.precondition,
        device,
    )
    built = time.perf_counter() - clock
    if not stack.train(len(batches), graph, due):
        return []
    scores: dict[str, list[float]] = {}
    for role in {"explore": ("dev", "test"), "search": ("val",), "final": ("test",)}[runs[0].stage]:
        names = [f"{role}/{run.seed}" if role == "val" else role for run in runs]
        positions = [packed.roles[run.task, name] for run, name in zip(runs, names, strict=True)]
        least = min(map(len, positions))
        scores[role] = stack.evaluate(torch.stack([p[:least] for p in positions])).tolist()
    losses = stack.losses[-len(batches) // variant.epochs :].mean(0).tolist()
    seconds = time.perf_counter() - clock
    rows = []
    for i, run in enumerate(runs):
        count = sum(
            value.numel()
            for name, value in own[i].parameters.items()
            if name in kinds and kinds[name] != "head" and run.variant.rate(kinds[name])
        )
        row: dict[str, Any] = {"task": run.task, "seed": run.seed, "stage": run.stage, "variant": run.variant.name}
        row |= {f"{role}_accuracy": round(values[i], 4) for role, values in scores.items()}
        row |= {"trained": count, "train_loss": losses[i], "updates": len(batches)}
        if not math.isfinite(losses[i]):
            row["failed"] = f"the loss is {losses[i]}"
            row["train_loss"] = None
        row |= {"stack": len(runs), "stack_seconds": round(seconds, 2), "built_seconds": round(built, 2)}
        rows.append({**row, "settings": settings_of(run.variant)})
    return rows


def settings_of(variant: Variant) -> dict[str, Any]:
    """Return the settings in which a variant differs from a plain one."""
    plain = Variant("")
    values = {f.name: getattr(variant, f.name) for f in dataclasses.fields(variant)}
    return {k: v for k, v in values.items() if k != "name" and v != getattr(plain, k)}


def stacks(runs: Iterable[Run], most: int, full: int) -> Iterator[list[Run]]:
    """Yield the runs of a list in stacks of one structure and stage, in the order of the first of each.

    Args:
        runs: the runs, in order of importance.
        most: largest number of runs in a stack.
        full: largest number of runs in a stack of the method ``full``.
    """
    open_: dict[str, list[list[Run]]] = {}
    order: list[list[Run]] = []
    for run in runs:
        key = f"{run.variant.structure()} {run.stage}"
        mine = open_.setdefault(key, [])
        if not mine or len(mine[-1]) == (full if run.variant.method == "full" else most):
            mine.append([])
            order.append(mine[-1])
        mine[-1].append(run)
    yield from order


def work(
    index: int,
    jobs: Any,
    folder: Path,
    tasks: Sequence[str],
    out: Path,
    deadline: float,
    device: str,
    graph: bool,
    facts: Mapping[str, Any],
    fields: Mapping[str, Any],
) -> None:
    """Take stacks from a queue until it is empty or the time (of ``time.time``) is over."""
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    packed = Packed(folder, tasks, fields, device)
    starts: dict[Any, Start] = {}
    pace = 0.0  # measured seconds per run and step
    print(f"worker {index}: ready, {deadline - time.time():.0f} s left", flush=True)
    while True:
        try:
            runs: list[Run] = jobs.get(timeout=0.5)
        except queue.Empty:
            return
        began = time.time()
        work_ = len(runs) * runs[0].variant.epochs
        if began + pace * work_ > deadline:
            continue
        try:
            rows = train_stack(runs, packed, fields, device, graph, lambda: time.time() > deadline, starts)
        except Exception as error:
            rows = []
            print(f"worker {index}: {runs[0].variant.name}: {type(error).__name__}: {error}", flush=True)
            if graph:  # plain launches may work where a graph does not
                rows = _again(runs, packed, fields, device, deadline, starts, index)
        if device != "cpu":
            torch.cuda.empty_cache()
        pace = (time.time() - began) / work_
        lines = "".join(json.dumps({**row, **facts}) + "\n" for row in rows)
        with out.open("a") as file:
            file.write(lines)
        print(
            f"worker {index}: {len(rows)} of {len(runs)} runs from {runs[0].variant.name!r} in "
            f"{time.time() - began:.1f} s, {deadline - time.time():.0f} s left",
            flush=True,
        )
        if time.time() > deadline:
            return


def _again(
    runs: Sequence[Run],
    packed: Packed,
    fields: Mapping[str, Any],
    device: str,
    deadline: float,
    starts: dict[Any, Start],
    index: int,
) -> list[dict[str, Any]]:
    try:
        return train_stack(runs, packed, fields, device, False, lambda: time.time() > deadline, starts)
    except Exception as error:
        print(f"worker {index}: without a graph: {type(error).__name__}: {error}", flush=True)
        return []


def run_list(
    runs: Sequence[Run],
    folder: Path,
    out: Path,
    seconds: float,
    workers: int,
    most: int = 48,
    full: int = 12,
    device: str = "cpu",
    graph: bool = False,
    commit: str | None = None,
    fields: Mapping[str, Any] | None = None,
) -> None:
    """Process runs in order in several processes; append rows to ``out`` whenever a stack ends.

    Args:
        runs: the runs, in order of importance.
        folder: the folder of the packed files.
        out: the file of JSON lines to append to.
        seconds: the time from now; a stack that would not end within it does not start.
        workers: number of processes.
        most: largest number of runs in a stack.
        full: largest number of runs in a stack of the method ``full``.
        device: the device of all processes.
        graph: whether each step is replayed as a CUDA graph.
        commit: the commit to record in the rows if there is no checkout.
        fields: fields of :class:`~efft_lab.train.TrainConfig`; by default those of the suite.
    """
    deadline = time.time() + seconds
    out.parent.mkdir(parents=True, exist_ok=True)
    facts = {**machine_facts(), **({"commit": commit} if commit else {})}
    context = torch.multiprocessing.get_context("spawn")
    jobs = context.Queue()
    for stack in stacks(runs, most, full):
        jobs.put(stack)
    tasks = list(dict.fromkeys(run.task for run in runs))
    arguments = (jobs, folder, tasks, out, deadline, device, graph, facts, fields or recipe())
    processes = [context.Process(target=work, args=(i, *arguments)) for i in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    jobs.cancel_join_thread()


def runs_of(variants: Iterable[Variant], tasks: Sequence[str], seeds: Sequence[int], stage: str) -> list[Run]:
    """Return a run of every setting on every task, one setting after the other."""
    return [Run(variant, task, seed, stage) for variant in variants for seed in seeds for task in tasks]
