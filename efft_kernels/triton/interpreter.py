"""Make Triton's interpreter (``TRITON_INTERPRET=1``) compute bfloat16 correctly.

The interpreter runs kernels on the CPU with numpy, which has no bfloat16 type. Triton therefore stores such values as
16-bit integers, multiplies those integers in ``tl.dot``, and truncates values that GPUs round. :func:`correct_bfloat16`
repairs products and conversions, and raises an error for arithmetic on bfloat16 values. The kernels of this package
need no such arithmetic, because they compute in fp32.

The module also repairs ``range`` over values of the interpreter, which fails with numpy 2.4. It patches private classes
of Triton. ``tests/efft_kernels/triton`` shows whether the patches work with the installed version of Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def correct_bfloat16() -> None:
    """Repair bfloat16 and ``range`` in the interpreter of this process. Further calls have no effect."""
    if hasattr(InterpreterBuilder, "efft_bfloat16"):
        return
    dot, cast, binary, unary = (
        getattr(InterpreterBuilder, name) for name in ("create_dot", "cast_impl", "binary_op", "unary_op")
    )

    def create_dot(self: Any, a: Any, b: Any, total: Any, *options: Any) -> Any:
        return dot(self, _widened(a), _widened(b), total, *options)

    def cast_impl(self: Any, value: Any, to: Any) -> Any:
        if _is_bfloat16(value):
            wide = _widened(value)
            return value if to.scalar == tl.bfloat16 else wide if to.scalar == tl.float32 else cast(self, wide, to)
        if to.scalar == tl.bfloat16:
            return TensorHandle(_rounded(value.data.astype(np.float32)), tl.bfloat16)
        return cast(self, value, to)

    def create_fp_to_fp(self: Any, value: Any, to: Any, rounding: Any) -> Any:
        if tl.bfloat16 in (value.dtype.scalar, to.scalar):
            return cast_impl(self, value, to)
        return convert(self, value, to, rounding)

    def no_arithmetic(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def run(self: Any, *values: Any) -> Any:
            if any(isinstance(v, TensorHandle) and _is_bfloat16(v) for v in values):
                raise TypeError("arithmetic on bfloat16 in the interpreter: convert to float32 first")
            return original(self, *values)

        return run

    convert = InterpreterBuilder.create_fp_to_fp
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.binary_op = no_arithmetic(binary)
    InterpreterBuilder.unary_op = no_arithmetic(unary)
    InterpreterBuilder.get_bf16 = lambda self, value: TensorHandle(_rounded(np.array([value], np.float32)), tl.bfloat16)
    InterpreterBuilder.efft_bfloat16 = True
    _allow_numpy_ranges()


def _is_bfloat16(value: Any) -> bool:
    return bool(value.dtype.scalar == tl.bfloat16)


def _widened(value: Any) -> Any:
    """Convert bfloat16 to the fp32 value with the same upper 16 bits; return any other value unchanged."""
    if not _is_bfloat16(value):
        return value
    return TensorHandle((value.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(values: np.ndarray) -> np.ndarray:
    """Round fp32 to the nearest bfloat16, ties to even, and return the result as 16-bit integers."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)


def _allow_numpy_ranges() -> None:
    """Define ``__index__`` for the interpreter's one-element tensors, which Triton 3.6 passes to ``range``.

    Triton's own definition needs a conversion that numpy 2.4 no longer supports.
    """
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)

        def index(self: Any) -> int:
            return int(np.asarray(self.handle.data).reshape(-1)[0])

        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    interpreter._patch_lang_tensor = patched
