"""Result files: JSON lines under ``benchmarks/results/``, each naming machine, versions, commit and command.

A line says what was measured (the fields of :data:`IDENTITY` that it has), where (:func:`machine_facts`) and what came
out: ``seconds`` and ``ratio`` (to the frozen floor of the same repetition) hold :func:`quantiles`, by phase where there
are several. A line whose measurement was refused or impossible has a ``reason`` and neither.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from efft_lab.provenance import commit, instruction_set, processor, versions

#: In a source checkout.
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

#: Fields that say what a line measures; two lines that agree in them measure the same thing.
IDENTITY = (
    "suite",
    "model",
    "case",
    "sweep",
    "images",
    "batch",
    "tokens",
    "rank",
    "dtype",
    "device",
    "l2",
    "cuda_graphs",
    "row",
)

#: Packages whose versions can move a figure; those that are installed are named.
_PACKAGES = ("torch", "triton", "timm", "peft")


@functools.cache
def machine_facts() -> dict[str, Any]:
    """Where and with what a figure was taken; asked once a process, so that the lines of a run share a ``date``."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{processor()}, {torch.get_num_threads()} threads, {instruction_set()}",
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), **versions(_PACKAGES)},
        "commit": commit(Path(__file__).parent) or "unknown",
        "command": " ".join(["python", *sys.orig_argv[1:]]),
    }
    if torch.cuda.is_available():
        facts["gpu"] = {"name": torch.cuda.get_device_name(), "driver": _driver(), "cuda": torch.version.cuda}
    return facts


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Minimum, 20 %, 50 % and 80 % quantile and number of ``values``, as they stand in a result file."""
    p20, p50, p80 = np.quantile(values, (0.2, 0.5, 0.8)).tolist()
    return {"min": min(values), "p20": p20, "p50": p50, "p80": p80, "n": len(values)}


def append(name: str, rows: Iterable[dict[str, Any]], folder: Path | None = None) -> Path:
    """Add rows to ``<folder>/<name>.jsonl``, by default in :data:`RESULTS`."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a result file, oldest first."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    return lines[0].strip() if lines else "unknown"
