"""Train runs in stacks, in several processes, until the time is over.

A run trains one setting on one task with one seed. A stack is a group of runs that advance together
(:mod:`efft_lab.studies.stacked`). All runs of a stack have the same structure (:meth:`Variant.structure`) and stage.
"""

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

#: Maps each stage to the role of the images on which its runs train (see :mod:`efft_lab.studies.extras.packed`).
ROLES = {"explore": "explore", "search": "train", "final": "trainval"}


def batches_of(runs: Sequence[Run], packed: Packed, epochs: int, batch: int) -> Tensor:
    """Return the positions of the images of each step of K runs, [steps, K, batch].

    The order is the same as in :func:`efft_lab.train.run`.
    """
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
    """Train the runs of one stack, evaluate them, and return one row (a line of the result file) per run.

    Args:
        runs: the runs, which have the same structure and stage.
        packed: the packed data.
        fields: fields of :class:`~efft_lab.train.TrainConfig`.
        device: the device.
        graph: whether to replay each step as a CUDA graph.
        due: function that returns True if the time is over. Training then stops, and no rows are returned.
        starts: cache for the initial parameters of settings, which several stacks may need.
    """
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
    """Return the fields of a variant that do not have their default value, without the name."""
    plain = Variant("")
    values = {f.name: getattr(variant, f.name) for f in dataclasses.fields(variant)}
    return {k: v for k, v in values.items() if k != "name" and v != getattr(plain, k)}


def stacks(runs: Iterable[Run], most: int, full: int) -> Iterator[list[Run]]:
    """Yield stacks that together contain all runs, in the order of their first runs.

    Args:
        runs: the runs, in order of importance.
        most: maximum number of runs in a stack.
        full: maximum number of runs in a stack of the method ``full``, which needs more memory.
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
    """Train stacks from a queue and append their rows to a file, until the queue is empty or the time is over.

    A stack does not start if it would probably not end before the deadline.

    Args:
        index: number of this process, for messages.
        jobs: queue of stacks.
        folder: the folder of the packed files.
        tasks: names of the tasks of all stacks.
        out: the file of JSON lines.
        deadline: end of the time, as returned by ``time.time``.
        device: the device.
        graph: whether to replay each step as a CUDA graph.
        facts: fields to add to every row.
        fields: fields of :class:`~efft_lab.train.TrainConfig`.
    """
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    packed = Packed(folder, tasks, fields, device)
    starts: dict[Any, Start] = {}
    pace = 0.0  # measured seconds per run and epoch in the last stack
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
            if graph:  # the stack may work without a CUDA graph
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
    """Train runs in order in several processes. Rows are appended to ``out`` whenever a stack ends.

    Args:
        runs: the runs, in order of importance.
        folder: the folder of the packed files.
        out: the file of JSON lines to append to.
        seconds: time limit. A stack does not start if it would probably end later, and stops if it takes longer.
        workers: number of processes.
        most: maximum number of runs in a stack.
        full: maximum number of runs in a stack of the method ``full``.
        device: the device of all processes.
        graph: whether to replay each step as a CUDA graph.
        commit: the commit to record in the rows, instead of the commit of the checkout.
        fields: fields of :class:`~efft_lab.train.TrainConfig`; by default, those of the suite ``local_long``.
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
    """Return one run for each setting, seed and task, one setting after the other."""
    return [Run(variant, task, seed, stage) for variant in variants for seed in seeds for task in tasks]
