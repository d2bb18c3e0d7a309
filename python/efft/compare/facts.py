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
        "machine": f"{processor()}, {cores()} cores, {torch.backends.cpu.get_cpu_capability()}",
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
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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
