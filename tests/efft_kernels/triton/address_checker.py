"""Triton's interpreter (``TRITON_INTERPRET=1``) made fit for testing: bfloat16 that is right, and checked addresses.

The interpreter runs kernels on the CPU with numpy, which has no bfloat16: Triton keeps such values as 16-bit integers,
multiplies those integers in ``tl.dot``, and truncates where hardware rounds. :func:`correct_bfloat16` mends what these
kernels use, products and conversions, and makes arithmetic on bfloat16 values an error (here it is done in fp32).
:func:`checked` is a memory and race checker for kernel launches.

Both reach into private classes; ``tests/efft_kernels/triton`` says whether they still hold for an installed version of
Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle


class AddressError(RuntimeError):
    """A kernel touched memory outside its arguments, or two programs wrote to one address."""


def correct_bfloat16() -> None:
    """Mend bfloat16 in this process's interpreter; doing it again changes nothing."""
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
    """bfloat16 as the fp32 with the same upper half; anything else as it is."""
    if not _is_bfloat16(value):
        return value
    return TensorHandle((value.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(values: np.ndarray) -> np.ndarray:
    """fp32 to the nearest bfloat16, ties to even, as 16-bit integers."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)


def _allow_numpy_ranges() -> None:
    """numpy 2.4 no longer turns arrays of one element into integers, which Triton 3.6 relies on in ``range``."""
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


@contextmanager
def checked() -> Iterator[list[str]]:
    """Check every kernel launched inside the ``with`` block: yields the list of their names as they run.

    A program may read and write elements of the launch's own tensor arguments and nothing between the rows of a strided
    one; no two programs may write to one address. Reads of what was never written are not seen: fill outputs with NaN
    (:func:`efft_kernels.testing.poisoned_empty`). A program runs as one thread, so races within it are not seen either.

    Raises:
        AddressError: from the launch that breaks a rule.
    """
    names: list[str] = []
    launch: dict[str, Any] = {}
    call, load, store, atomic = (
        GridExecutor.__call__,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
        InterpreterBuilder.create_atomic_rmw,
    )

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        bases = (getattr(a, "base", a) for a in (*args, *kwargs.values()))  # what a tensor descriptor is of
        tensors = [a for a in bases if isinstance(a, Tensor)]
        launch.update(name=names[-1], allowed=_intervals(tensors), written={})
        return call(self, *args, **kwargs)

    def touch(self: Any, pointers: Any, mask: Any, what: str) -> np.ndarray:
        addresses, active = np.broadcast_arrays(pointers.data, mask.data)
        addresses = addresses[active]
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        first, end = launch["allowed"]
        at = np.searchsorted(first, addresses, side="right") - 1
        outside = (at < 0) | (addresses + np.uint64(size) > end[np.maximum(at, 0)])
        if outside.any():
            raise AddressError(
                f"{launch['name']}: program {self.grid_idx} {what} {int(outside.sum())} of {addresses.size} elements "
                "outside its arguments"
            )
        return addresses

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        touch(self, pointers, mask, "reads")
        return load(self, pointers, mask, *rest, **named)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        written = launch["written"]
        for address in touch(self, pointers, mask, "writes").tolist():
            if written.setdefault(address, self.grid_idx) != self.grid_idx:
                raise AddressError(
                    f"{launch['name']}: programs {written[address]} and {self.grid_idx} write to one address"
                )
        return store(self, pointers, value, mask, *rest, **named)

    def create_atomic_rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        touch(self, pointers, mask, "updates")
        return atomic(self, op, pointers, value, mask, *rest, **named)

    with (
        mock.patch.object(GridExecutor, "__call__", run),
        mock.patch.object(InterpreterBuilder, "create_masked_load", create_masked_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", create_masked_store),
        mock.patch.object(InterpreterBuilder, "create_atomic_rmw", create_atomic_rmw),
    ):
        yield names


def _intervals(tensors: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """(first bytes, ends) of the runs of memory that the tensors' elements occupy, sorted and merged."""
    starts: list[np.ndarray] = []
    for tensor in tensors:
        offsets = np.zeros(int(tensor.numel() > 0), np.int64)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            offsets = (offsets[:, None] + np.arange(size) * stride).reshape(-1)
        size = tensor.element_size()
        elements = tensor.data_ptr() + np.unique(offsets) * size
        starts.append((elements[:, None] + np.arange(size)).reshape(-1))
    touched = np.unique(np.concatenate([np.zeros(0, np.int64), *starts]))
    breaks = np.flatnonzero(np.diff(touched) != 1)
    first = touched[np.concatenate([[0], breaks + 1])] if touched.size else touched
    end = touched[np.concatenate([breaks, [touched.size - 1]])] + 1 if touched.size else touched
    return first.astype(np.uint64), end.astype(np.uint64)
