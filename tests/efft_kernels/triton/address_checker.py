"""Check addresses and races of kernels that run in Triton's interpreter (``TRITON_INTERPRET=1``).

The module patches private classes of Triton. ``kernels/test_checks.py`` shows whether the patches fit the installed
version.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder


class AddressError(RuntimeError):
    """Raised if a kernel accesses memory outside its arguments, or if two programs write to one address."""


@contextmanager
def checked() -> Iterator[list[str]]:
    """Check every kernel launched inside the ``with`` block. Yield a list, to which each launch appends a kernel name.

    A program may read and write elements of the launch's own tensor arguments, but not the gaps between the rows of a
    strided tensor. No two programs may write to one address. The checker does not detect reads of uninitialized memory;
    to find them, fill outputs with NaN (:func:`efft_kernels.testing.poisoned_empty`). A program runs as one thread, so
    races within a program are not detected either.

    Raises:
        AddressError: the current launch broke one of these rules.
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
        flat = (part for a in (*args, *kwargs.values()) for part in (a if isinstance(a, tuple) else (a,)))
        bases = (getattr(a, "base", a) for a in flat)  # the tensor behind a tensor descriptor
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
    """Return (first bytes, ends) of the memory ranges that the tensors' elements occupy, sorted and merged."""
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
