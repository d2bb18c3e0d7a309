"""Emulate CUDA graphs on the CPU: record the operators of a function with their tensors, and repeat them.

An emulated graph has the properties of a CUDA graph that matter to the tests. A replay uses the tensors and the Python
numbers of the capture, and does not run Python code again. A capture refuses operators that would wait for a device, or
whose output sizes depend on data, and it does not change any tensor. A replay changes parameters without changing their
version counters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Operators that wait for a device, or whose output sizes depend on data.
_REFUSED = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
}


#: Arguments that an operator changes although its schema does not say so.
_CHANGED = {torch.ops.aten.native_batch_norm.default: ("running_mean", "running_var")}


class _Recorder(TorchDispatchMode):
    """Record all calls of operators, and the memory that they change."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _REFUSED:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        arguments = func._schema.arguments
        given = {arguments[i].name: value for i, value in enumerate(args)} | kwargs
        for argument in arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written or argument.name in _CHANGED.get(func, ()):
                for tensor in tree_leaves(given.get(argument.name)):
                    if isinstance(tensor, Tensor):
                        storage = tensor.untyped_storage()
                        self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result

    def undo(self) -> None:
        """Restore the memory that the calls changed."""
        for storage, before in self._before.values():
            storage.copy_(before)

    @torch.inference_mode(False)
    @torch.no_grad()
    def repeat(self) -> None:
        """Repeat all calls on the same tensors, and write their results to the results of the recorded calls."""
        arguments = tree_leaves([(args, kwargs) for _, args, kwargs, _ in self.calls])
        leaves = tuple({id(t): t for t in arguments if isinstance(t, nn.Parameter)}.values())
        with torch.autograd._unsafe_preserve_version_counter(leaves):
            for func, args, kwargs, recorded in self.calls:
                results = func(*args, **kwargs)
                for own, new in zip(tree_leaves(recorded), tree_leaves(results), strict=True):
                    if isinstance(own, Tensor) and own.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        own.copy_(new)


class EmulatedGraphs:
    """Replace :class:`efft.graphs.capture.CudaGraphs` in tests, and count the captures and the replays."""

    captured = replayed = 0

    def warm_up(self, run: Callable[[], None]) -> None:
        run()

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        recorder = _Recorder()
        with torch.random.fork_rng([]):
            try:
                with recorder:
                    run()
            finally:
                recorder.undo()
        type(self).captured += 1

        def replay() -> None:
            type(self).replayed += 1
            recorder.repeat()

        return replay
