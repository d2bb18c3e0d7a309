"""Read and write result files, and record the machine and the versions that produced a result.

A result file is ``benchmarks/results/NAME.jsonl`` and holds one JSON object per line. Every line contains the facts of
:func:`machine_facts` and the outcome of one measurement. The module that writes a file defines the other fields.

The benchmarks of speed (such as ``ops.jsonl`` and ``model.jsonl``) use a common form. Those fields of :data:`IDENTITY`
that a line contains identify the measurement. ``seconds`` holds the :func:`quantiles` of the measured times. If a
measurement has several phases, ``seconds`` maps each phase to its quantiles. The frozen baseline is the same step of
the base model without an adapter. ``ratio`` holds the quantiles of each time divided by the time of the frozen baseline
in the same repetition. If the measurement was not possible, the line has a ``reason`` instead of ``seconds`` and
``ratio``.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
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

from efft_kernels import __version__

#: The folder of the result files in a source checkout.
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

#: Fields that identify a measured time. If two lines of a file have the same values in these fields, the later line
#: repeats the measurement of the earlier line.
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
    "generation",
    "row",
)

#: Packages whose versions are recorded, because they can change a result.
_PACKAGES = ("torch", "triton", "timm", "peft", "accelerate", "numpy")

#: Environment variables that select kernels. If they are set, the recorded command starts with them.
_SELECTING = ("EFFT_BACKEND", "EFFT_SM90_GENERATION")


def machine_facts(threads: int | None = None) -> dict[str, Any]:
    """Return the facts that every line of a result file records about its run.

    The facts are the date, the machine, the number of cores, the versions, the commit, the command, and the GPU if
    there is one. They are collected once per process. All lines of one run therefore have the same ``date``.

    Args:
        threads: number of threads that computed the result; by default, the number of torch threads of this process.
    """
    facts = _process_facts()
    threads = torch.get_num_threads() if threads is None else threads
    return {**facts, "machine": f"{processor()}, {threads} threads, {instruction_set()}"}


@functools.cache
def _process_facts() -> dict[str, Any]:
    selected = [f"{name}={os.environ[name]}" for name in _SELECTING if os.environ.get(name)]
    facts: dict[str, Any] = {
        "date": now(),
        "machine": None,  # machine_facts fills this field; the entry fixes its position
        "cores": os.cpu_count(),
        "versions": versions(*_PACKAGES),
        "commit": commit(Path(__file__).parent) or __version__,
        "command": " ".join([*selected, "python", *sys.orig_argv[1:]]),
    }
    if torch.cuda.is_available():
        facts["gpu"] = {"name": torch.cuda.get_device_name(), "driver": _driver(), "cuda": torch.version.cuda}
    return facts


def now() -> str:
    """Return the date and time in UTC with a resolution of one second, as in ``2026-01-31T12:00:00+00:00``."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def versions(*packages: str) -> dict[str, str]:
    """Return the version of Python and the versions of those given packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cores() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Return the name of the processor."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def processor_flags() -> set[str]:
    """Return the flags of the processor that Linux lists, such as ``avx2``, or an empty set if there are none."""
    return set(_cpuinfo("flags").split())


def instruction_set() -> str:
    """Return the name of the instruction set that PyTorch uses, with " + AMX" if the processor has AMX for bfloat16."""
    amx = " + AMX" if "amx_bf16" in processor_flags() else ""
    return torch.backends.cpu.get_cpu_capability() + amx


def _cpuinfo(field: str) -> str:
    """Return a field of the first processor in ``/proc/cpuinfo``, or an empty text if the file or field is missing."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def commit(here: Path) -> str | None:
    """Return the commit of the checkout that contains a folder, or None without a checkout or without git.

    The text ends with ``+changes`` if tracked files differ from the commit. README.md and ``benchmarks/results`` are
    not compared.
    """
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    except OSError:
        return None
    if head.returncode:
        return None
    status = ["git", "status", "--porcelain", "-uno", "--", ":/", ":!/benchmarks/results", ":!/README.md"]
    dirty = subprocess.run(status, cwd=here, capture_output=True, text=True).stdout
    return head.stdout.strip() + ("+changes" if dirty else "")


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Summarize ``values`` for a result file.

    The summary maps ``min`` to the minimum, ``p20``, ``p50`` and ``p80`` to the 20 %, 50 % and 80 % quantiles, and
    ``n`` to the number of values.
    """
    p20, p50, p80 = np.quantile(values, (0.2, 0.5, 0.8)).tolist()
    return {"min": min(values), "p20": p20, "p50": p50, "p80": p80, "n": len(values)}


def append(name: str, rows: Iterable[dict[str, Any]], folder: Path | None = None) -> Path:
    """Append rows to ``<folder>/<name>.jsonl`` and return the path. The default folder is :data:`RESULTS`."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a result file, oldest first."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    return lines[0].strip() if lines else "unknown"
