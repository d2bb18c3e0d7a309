"""Result files, and where and with what a result was made.

Result files are JSON lines under ``benchmarks/results/``. A line says what was measured (the fields of
:data:`IDENTITY` that it has), where and with what (:func:`machine_facts`) and what the outcome was: ``seconds`` and
``ratio`` (to the frozen baseline of the same repetition) hold :func:`quantiles`, by phase if there are several. A line
whose measurement was refused or impossible has a ``reason`` instead of both.
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

#: Packages whose version can change a figure.
_PACKAGES = ("torch", "triton", "timm", "peft", "accelerate", "numpy")


def machine_facts(threads: int | None = None) -> dict[str, Any]:
    """Where and with what a result was made: date, machine, cores, versions, commit, command and GPU.

    The facts are collected once per process, so the lines of one run share a ``date``.

    Args:
        threads: number of threads that computed the result; by default this process's torch threads.
    """
    facts = _process_facts()
    threads = torch.get_num_threads() if threads is None else threads
    return {**facts, "machine": f"{processor()}, {threads} threads, {instruction_set()}"}


@functools.cache
def _process_facts() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "date": now(),
        "machine": None,  # its place in the line
        "cores": os.cpu_count(),
        "versions": versions(*_PACKAGES),
        "commit": commit(Path(__file__).parent) or __version__,
        "command": " ".join(["python", *sys.orig_argv[1:]]),
    }
    if torch.cuda.is_available():
        facts["gpu"] = {"name": torch.cuda.get_device_name(), "driver": _driver(), "cuda": torch.version.cuda}
    return facts


def now() -> str:
    """The date and time in UTC, to the second, as in ``2026-01-31T12:00:00+00:00``."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cores() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The processor's name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def processor_flags() -> set[str]:
    """Names of the processor's instruction sets as Linux lists them; empty on other systems."""
    return set(_cpuinfo("flags").split())


def instruction_set() -> str:
    """The widest instruction set that PyTorch uses, and whether the processor has matrix registers for bfloat16."""
    amx = " + AMX" if "amx_bf16" in processor_flags() else ""
    return torch.backends.cpu.get_cpu_capability() + amx


def _cpuinfo(field: str) -> str:
    """A field of the first processor in Linux's ``/proc/cpuinfo``; empty if there is none."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def commit(here: Path) -> str | None:
    """The commit of the checkout around a folder, with ``+changes`` if the tree differs from it (results aside); None
    without a checkout or without git."""
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
    """Minimum, 20 %, 50 % and 80 % quantile and number of ``values``, in the form that result files hold."""
    p20, p50, p80 = np.quantile(values, (0.2, 0.5, 0.8)).tolist()
    return {"min": min(values), "p20": p20, "p50": p50, "p80": p80, "n": len(values)}


def append(name: str, rows: Iterable[dict[str, Any]], folder: Path | None = None) -> Path:
    """Adds rows to ``<folder>/<name>.jsonl``, by default in :data:`RESULTS`."""
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
