"""Load the compiled libraries, which register the implementations of the backends ``cpu`` and ``cuda``.

There is one library per backend. It implements the operators that :mod:`efft_kernels.ops` declares. This module looks
for the library in the installed package and in the cache of ``python -m efft_kernels build``, and never compiles
anything. If a library is missing or does not load, its backend cannot run, and :data:`MISSING` contains the reason. The
other backends are not affected.
"""

from __future__ import annotations

import ctypes

import torch

from efft_kernels.build import TARGETS, find

_HOW = "python -m efft_kernels build"


def _load(target: str) -> str | None:
    """Load the library of ``target``. Return None if this succeeds, else the reason for the failure."""
    path = find(target)
    if path is None:
        return f"the compiled library of the backend {target!r} is not installed: {_HOW} --targets {target}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path} does not load: {error}; build it on this machine: {_HOW} --targets {target}"
    return None


def instruction_set() -> str:
    """Return the instruction set that the ``cpu`` library uses on this machine.

    ``EFFT_CPU_ISA`` (see ENVIRONMENT.md) may limit the instruction set. Call this only if the library is loaded.
    """
    ask = ctypes.CDLL(str(find("cpu"))).efft_cpu_instruction_set
    ask.restype = ctypes.c_char_p
    name: bytes | None = ask()
    return "none, because the value of EFFT_CPU_ISA is unknown" if name is None else name.decode()


#: The reason why the library of each target, ``cpu`` or ``cuda``, is not loaded; None if the library is loaded.
MISSING: dict[str, str | None] = {target: _load(target) for target in TARGETS}
