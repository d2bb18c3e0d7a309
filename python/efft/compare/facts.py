"""Where and with what a result was made."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "timm", "peft", "accelerate", "numpy")


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def facts() -> dict[str, Any]:
    """Commit, command, versions and machine."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "commit": _commit(),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": f"{_processor()}, {cores()} cores, {torch.backends.cpu.get_cpu_capability()}",
        **gpu,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of the source checkout, marked where the tree has changes on top of it; else the library's version."""
    from efft_kernels import __version__

    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    except OSError:  # no git
        return __version__
    if head.returncode:
        return __version__
    status = ["git", "status", "--porcelain", "-uno", "--", ":/", ":!/benchmarks/results", ":!/README.md"]
    dirty = subprocess.run(status, cwd=here, capture_output=True, text=True).stdout
    return head.stdout.strip() + ("+changes" if dirty else "")
