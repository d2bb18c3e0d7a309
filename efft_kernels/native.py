"""Load the libraries of the compiled extension, which register the implementations of ``cpu`` and ``cuda``.

This module looks for a library in the installed package and in the cache of ``python -m efft_kernels build``. It never
compiles anything. :mod:`efft_kernels.ops` declares the schemas.
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
        return f"the compiled extension is not installed: {_HOW} --targets {target}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path} does not load: {error}; build it on this machine: {_HOW} --targets {target}"
    return None


def instruction_set() -> str:
    """Return the instruction set that the loaded ``cpu`` library uses on this machine (see ``EFFT_CPU_ISA``)."""
    ask = ctypes.CDLL(str(find("cpu"))).efft_cpu_instruction_set
    ask.restype = ctypes.c_char_p
    name: bytes | None = ask()
    return "none, because EFFT_CPU_ISA names an unknown one" if name is None else name.decode()


#: The reason why the library of each target, ``cpu`` or ``cuda``, is not loaded; None if the library is loaded.
MISSING: dict[str, str | None] = {target: _load(target) for target in TARGETS}
