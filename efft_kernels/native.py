"""The compiled extension: loads its libraries, which register the implementations of ``cpu`` and ``cuda``.

A library is looked for in the installed package and in the cache of ``python -m efft_kernels build``; nothing is ever
compiled here. Its schemas are those of :mod:`efft_kernels.ops`.
"""

from __future__ import annotations

import ctypes

import torch

from efft_kernels.build import TARGETS, find

_HOW = "python -m efft_kernels build"


def _load(target: str) -> str | None:
    """None if the library of ``target`` was loaded, else why it was not."""
    path = find(target)
    if path is None:
        return f"the compiled extension is not there: {_HOW} --targets {target}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path} does not load: {error}; build it on this machine: {_HOW} --targets {target}"
    return None


def instruction_set() -> str:
    """The one that the ``cpu`` library uses on this processor (see ``EFFT_CPU_ISA``); the library must be loaded."""
    ask = ctypes.CDLL(str(find("cpu"))).efft_cpu_instruction_set
    ask.restype = ctypes.c_char_p
    name: bytes | None = ask()
    return "none, EFFT_CPU_ISA names no known one" if name is None else name.decode()


#: Why the library of a target, ``cpu`` or ``cuda``, is not loaded; None if it is.
MISSING: dict[str, str | None] = {target: _load(target) for target in TARGETS}
