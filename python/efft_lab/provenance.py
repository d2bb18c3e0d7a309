"""Where and with what a result was made."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from efft_kernels import __version__

_PACKAGES = ("torch", "timm", "peft", "accelerate", "numpy")


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def facts() -> dict[str, Any]:
    """Commit, command, versions and machine."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "commit": commit(Path(__file__).parent) or __version__,
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "versions": {"python": platform.python_version(), **versions(_PACKAGES)},
        "machine": f"{processor()}, {cores()} cores, {instruction_set()}",
        **gpu,
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Version of each of the packages that is installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The processor's name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def instruction_set() -> str:
    """The widest that PyTorch uses, and whether the processor multiplies bfloat16 in matrix registers too."""
    amx = " + AMX" if "amx_bf16" in _cpuinfo("flags").split() else ""
    return torch.backends.cpu.get_cpu_capability() + amx


def _cpuinfo(field: str) -> str:
    """What Linux says of the first processor, if anything."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def commit(here: Path) -> str | None:
    """The commit of the checkout around a folder, marked where the tree has changes on top of it (other than results);
    None where there is no checkout, or no git."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    except OSError:
        return None
    if head.returncode:
        return None
    status = ["git", "status", "--porcelain", "-uno", "--", ":/", ":!/benchmarks/results", ":!/README.md"]
    dirty = subprocess.run(status, cwd=here, capture_output=True, text=True).stdout
    return head.stdout.strip() + ("+changes" if dirty else "")
