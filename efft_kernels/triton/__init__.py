"""Triton kernels for GPUs of compute capability 8.0 and newer.

This file registers them without importing Triton, which need not be installed; the first call does. Where to change
what: one file an op (``tt_linear``, ``tt_contract``, ``tt_merge``), two kernels that tt_linear is made of
(``lowrank_gemm``, ``reduce_tokens``), tile sizes and their origin (``launch``), and what runs and checks them without a
GPU (``interpreter``).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from efft_kernels.backends import Backend
from efft_kernels.ops._schemas import implement

#: The file of each op.
_FILES = {
    "tt_linear_fwd": "tt_linear",
    "tt_linear_bwd": "tt_linear",
    "tt_gelu_linear_fwd": "tt_gelu_linear",
    "tt_gelu_linear_bwd": "tt_gelu_linear",
    "tt_norm_linear_fwd": "tt_norm_linear",
    "tt_norm_linear_bwd": "tt_norm_linear",
    "tt_linear_grouped": "tt_linear_grouped",
    "tt_contract_fwd": "tt_contract",
    "tt_contract_bwd": "tt_contract",
    "tt_merge_": "tt_merge",
}


def _late(op: str, file: str) -> Callable[..., Any]:
    return lambda *arguments: getattr(importlib.import_module(f"efft_kernels.triton.{file}"), op)(*arguments)


for _op, _file in _FILES.items():
    implement(_op, Backend.TRITON, _late(_op, _file))
