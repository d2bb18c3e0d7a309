"""``python -m benchmarks extras``: pack, run or sum up."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from efft_lab.studies import extras
from efft_lab.studies.extras import lists
from efft_lab.studies.extras.packed import EXPLORED, SEEDS, pack_base, pack_task
from efft_lab.studies.extras.runs import ROLES, run_list, runs_of
from efft_lab.studies.extras.variants import Variant, recipe

TASKS = ("orientation", "count", "cifar10", "x-location", "animal-silhouettes", "mnist5k")


def summarize(rows: Sequence[Mapping[str, Any]], role: str = "dev") -> str:
    """Mean accuracy of each setting over the tasks that all settings have in that role; rivals with their rate chosen
    for each task are marked by ``*``."""
    table: dict[str, dict[str, list[float]]] = {}
    trained: dict[str, int] = {}
    for row in rows:
        if row.get(f"{role}_accuracy") is None:
            continue
        value = 0.0 if row.get("failed") else row[f"{role}_accuracy"]
        table.setdefault(row["variant"], {}).setdefault(row["task"], []).append(value)
        trained[row["variant"]] = row["trained"]
    tasks = sorted({task for scores in table.values() for task in scores})
    means = {name: {t: sum(v) / len(v) for t, v in scores.items()} for name, scores in table.items()}
    families: dict[str, list[str]] = {}
    for name in means:
        if " lr " in name:
            families.setdefault(name.split(" lr ")[0], []).append(name)
    for family, names in families.items():
        if len(names) > 1:
            means[f"{family} *"] = {t: max(means[n].get(t, 0.0) for n in names) for t in tasks}
            trained[f"{family} *"] = trained[names[0]]
            table[f"{family} *"] = table[names[0]]
    lines = [f"{'setting':<46} {'trained':>8} {'n':>3}  mean  " + "  ".join(f"{t[:8]:>8}" for t in tasks)]

    def mean(name: str) -> float:
        return sum(means[name].get(t, 0.0) for t in tasks) / len(tasks)

    for name in sorted(means, key=mean, reverse=True):
        n = sum(map(len, table[name].values()))
        cells = "  ".join(f"{100 * means[name].get(t, math.nan):8.1f}" for t in tasks)
        lines.append(f"{name:<46} {trained[name]:>8} {n:>3} {100 * mean(name):5.2f}  {cells}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Pack, run or sum up."""
    parser = argparse.ArgumentParser(description=extras.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["pack", "run", "summary"])
    parser.add_argument("--folder", type=Path, default=Path("packed"), help="of the packed files")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument(
        "--list", default="explore", help="a list of efft_lab.studies.extras.lists, or a JSON file of variants"
    )
    parser.add_argument("--names", nargs="+", help="only settings whose name begins with one of these")
    parser.add_argument("--stage", choices=sorted(ROLES), default="explore")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--epochs", type=int, help="instead of those of the settings")
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--most", type=int, default=48, help="runs at once in a process")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--graph", action="store_true")
    parser.add_argument("--commit")
    parser.add_argument("--out", type=Path, default=Path("extras.jsonl"))
    args = parser.parse_args(arguments)
    if args.command == "summary":
        rows = [json.loads(line) for line in args.out.read_text().splitlines()]
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
    )
    return 0
