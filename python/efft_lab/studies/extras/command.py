"""Implement ``python -m benchmarks extras``, which packs the data, runs settings or summarizes the results.

A setting is a method with its ranks, learning rates and additional trained parameters. A row is the result of one
setting on one task with one seed. A role is a set of images for evaluation: ``dev``, ``val`` or ``test``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from efft_lab.record import read
from efft_lab.studies import extras
from efft_lab.studies.extras import lists
from efft_lab.studies.extras.packed import EXPLORED, SEEDS, pack_base, pack_task
from efft_lab.studies.extras.runs import ROLES, run_list, runs_of
from efft_lab.studies.extras.variants import Variant, recipe

TASKS = ("orientation", "count", "cifar10", "x-location", "animal-silhouettes", "mnist5k")


def family(name: str) -> str:
    """Return the name of a setting without its learning rate, such as ``lora r8`` for ``lora r8 lr 0.001``.

    The settings of a family differ only in their learning rate.
    """
    return name.split(" lr ")[0]


def means(rows: Iterable[Mapping[str, Any]], role: str) -> dict[str, dict[str, float]]:
    """Return the mean accuracy over seeds by setting and task, as ``means[setting][task]``.

    Only rows that have an accuracy for the role are used. The accuracy of a run that diverged counts as 0.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row.get(f"{role}_accuracy") is not None:
            value = 0.0 if row.get("failed") else row[f"{role}_accuracy"]
            found.setdefault(row["variant"], {}).setdefault(row["task"], []).append(value)
    return {name: {task: fmean(values) for task, values in scores.items()} for name, scores in found.items()}


def chosen(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], str]:
    """Return a mapping from each (family, task) to the setting with the best validation accuracy.

    If a family has no validation accuracy on a task, because it has no run of the stage ``search``, its accuracy on
    ``dev`` decides. Of several settings with the same accuracy, the first one is returned.
    """
    best: dict[tuple[str, str], tuple[float, str]] = {}
    for role in ("val", "dev"):
        of_role: dict[tuple[str, str], tuple[float, str]] = {}
        for name, scores in means(rows, role).items():
            for task, score in scores.items():
                key = family(name), task
                if key not in of_role or score > of_role[key][0]:
                    of_role[key] = score, name
        best = {**of_role, **best}
    return {key: name for key, (_, name) in best.items()}


def summarize(rows: Sequence[Mapping[str, Any]], role: str = "dev") -> str:
    """Return a table with the mean accuracy of each setting over the tasks, the best setting first.

    A family with several learning rates also has a line marked ``*``. In this line, each task has the accuracy of the
    setting that :func:`chosen` returns.
    """
    table = means(rows, role)
    trained = {row["variant"]: row["trained"] for row in rows}
    runs = Counter(row["variant"] for row in rows if row.get(f"{role}_accuracy") is not None)
    rates = Counter(map(family, {row["variant"] for row in rows}))
    for (name, task), setting in chosen(rows).items():
        if rates[name] > 1 and task in table.get(setting, {}):
            table.setdefault(f"{name} *", {})[task] = table[setting][task]
            trained[f"{name} *"] = trained[setting]
    tasks = sorted({task for scores in table.values() for task in scores})
    mean = {name: fmean(scores.get(task, 0.0) for task in tasks) for name, scores in table.items()}
    lines = [f"{'setting':<46} {'trained':>8} {'n':>3}  mean  " + "  ".join(f"{task[:8]:>8}" for task in tasks)]
    for name in sorted(table, key=lambda name: -mean[name]):
        cells = "  ".join(f"{100 * table[name].get(task, math.nan):8.1f}" for task in tasks)
        lines.append(f"{name:<46} {trained[name]:>8} {runs[name]:>3} {100 * mean[name]:5.2f}  {cells}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command ``extras``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks extras",
        description=extras.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=["pack", "run", "summary"])
    parser.add_argument("--folder", type=Path, default=Path("packed"), help="folder of the packed files")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument(
        "--list", default="explore", help="name of a function in efft_lab.studies.extras.lists, or a JSON file"
    )
    parser.add_argument("--names", nargs="+", help="run only settings whose names begin with one of these texts")
    parser.add_argument("--stage", choices=sorted(ROLES), default="explore")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--epochs", type=int, help="number of epochs, instead of the number in each setting")
    parser.add_argument("--batch-size", type=int, default=recipe()["batch_size"])
    parser.add_argument("--drop-path", type=float, default=0.0)
    parser.add_argument(
        "--chosen", type=Path, help="result file; run only the best setting of each family on each task in this file"
    )
    parser.add_argument("--seconds", type=float, default=200, help="time limit of the command run")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--most", type=int, default=48, help="maximum number of runs in a stack")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--graph", action="store_true", help="replay each step as a CUDA graph")
    parser.add_argument("--commit", help="commit to record, if the folder is not a checkout")
    parser.add_argument("--out", type=Path, default=Path("extras.jsonl"))
    args = parser.parse_args(arguments)
    if args.command == "summary":
        rows = [*read(args.out), *(read(args.chosen) if args.chosen else [])]
        print(summarize(rows, {"explore": "dev", "search": "val", "final": "test"}[args.stage]))
        return 0
    if args.command == "pack":
        args.folder.mkdir(parents=True, exist_ok=True)
        paths = [pack_task(task, args.folder, recipe()) for task in args.tasks]
        classes = [int(np.load(path)["classes"]) for path in args.folder.glob("*.npz")]
        for path in [*paths, pack_base(args.folder, recipe(), classes)]:
            print(f"{path}: {os.path.getsize(path) / 2**20:.1f} MiB")
        return 0
    if args.list.endswith(".json"):
        variants = [Variant(**values) for values in json.loads(Path(args.list).read_text())]
    else:
        variants = getattr(lists, args.list)()
    if args.names:
        variants = [v for v in variants if v.name.startswith(tuple(args.names))]
    if args.epochs:
        variants = [dataclasses.replace(v, epochs=args.epochs) for v in variants]
    seeds = args.seeds or (EXPLORED[:2] if args.stage == "explore" else SEEDS[:1] if args.stage == "search" else SEEDS)
    runs = runs_of(variants, args.tasks, seeds, args.stage)
    if args.chosen:
        best = chosen(read(args.chosen))
        runs = [run for run in runs if best.get((family(run.variant.name), run.task), "") in ("", run.variant.name)]
    print(f"{len(variants)} settings, {len(runs)} runs", flush=True)
    run_list(
        runs,
        args.folder,
        args.out,
        args.seconds,
        args.workers,
        args.most,
        device=args.device,
        graph=args.graph,
        commit=args.commit,
        fields={**recipe(), "batch_size": args.batch_size, "drop_path": args.drop_path},
    )
    return 0
