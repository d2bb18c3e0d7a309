"""Capture work on a GPU in a CUDA graph, and check before a replay that the graph still fits the model.

A graph repeats kernels with the same memory addresses and numerical arguments as in the capture. It does not run Python
again. This module is the only one in ``efft`` that uses ``torch.cuda.CUDAGraph``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from efft.adapting.inject import adapted_layers
from efft.adapting.sharding import is_sharded
from efft.adapting.wrappers import holder_kind


class Graphs(Protocol):
    """Run and capture functions on one device."""

    def warm_up(self, run: Callable[[], None]) -> None:
        """Run a function under the conditions of a capture (on the same stream), but with all its effects."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Capture a function without any of its effects, and return a function that replays it.

        Raises:
            RuntimeError: the function does something that no graph can contain.
        """


class CudaGraphs:
    """Capture on a side stream of a GPU. All graphs of one object share their memory.

    The next replay of any of these graphs may overwrite the results that a replay leaves in the shared memory. The
    functions to capture therefore write their results to tensors that were created before.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: list[torch.cuda.CUDAGraph] = []  # memory can be shared only with graphs that still exist

    def warm_up(self, run: Callable[[], None]) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()
        current.wait_stream(self._stream)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as those that pin the memory of batches, may use the GPU meanwhile.
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
        ):
            run()
        self._captured.append(graph)
        return graph.replay


def graphs_on(device: torch.device) -> Graphs:
    """Return an object that captures on ``device``, which must be a GPU."""
    return CudaGraphs(device)


def capture(graphs: Graphs, run: Callable[[], None], what: str) -> Callable[[], None]:
    """Capture ``run``. ``what`` names the captured work in the error.

    Raises:
        RuntimeError: the work cannot be captured; the message contains torch's reason.
    """
    try:
        return graphs.capture(run)
    except RuntimeError as error:
        # If the captured work fails, ending the capture fails too, with a second error.
        cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
        raise RuntimeError(
            f"{what} cannot be captured as a CUDA graph: {str(cause).strip()}. A captured function must not wait for "
            "the GPU (.item(), .cpu(), print, a hook that logs values), and its sizes must not depend on data "
            "(nonzero, boolean masks). Change this part, or run without a graph"
        ) from error


def device_of(operation: str, model: nn.Module) -> torch.device:
    """Return the GPU on which all parameters and buffers of a model are.

    Raises:
        ValueError: the parameters and buffers are not all on one GPU, or a wrapper, a shard or an offloading hook moves
            them.
    """
    for name, module in model.named_modules():
        wrapper = holder_kind(module)
        if wrapper is not None:
            raise ValueError(
                f"{operation}: expected a model on one GPU, got a {wrapper}, whose communication is not captured: pass "
                "the model inside, or train without a graph"
            )
        if getattr(getattr(module, "_hf_hook", None), "offload", False):
            raise ValueError(
                f"{operation}: expected a model whose weights stay on the GPU, but accelerate offloads those of "
                f"{name!r}: load the model without offloading"
            )
    if is_sharded(model) or any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError(f"{operation}: expected a whole model, got one that is sharded: train it without a graph")
    devices = sorted({str(t.device) for t in (*model.parameters(), *model.buffers())})
    if len(devices) != 1 or not can_capture(torch.device(devices[0])):
        raise ValueError(
            f"{operation}: expected a model on one CUDA device, got one on {' and '.join(devices) or 'no device'}: "
            "move it with model.to('cuda'), or run without a graph"
        )
    return torch.device(devices[0])


def can_capture(device: torch.device) -> bool:
    """Return whether work on this kind of device can be captured."""
    return device.type == "cuda"


class Constants:
    """Hold everything about a model that a captured graph contains as a constant.

    These are the modules and their modes, the addresses of parameters and buffers, and the updates that are merged or
    disabled.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(name, m, m.training, dict(m._modules)) for name, m in model.named_modules()]
        self._tensors = [
            (f"{path}.{name}".lstrip("."), registry, name, tensor, _address(tensor))
            for path, module in model.named_modules()
            for registry in (module._parameters, module._buffers)
            for name, tensor in registry.items()
            if tensor is not None
        ]
        updates = adapted_layers(model).items() if hasattr(model, "efft") else ()
        self._updates = [(name, update, update.enabled, update.merged) for name, update in updates]

    def check(self, operation: str) -> None:
        """Raise RuntimeError if the model is no longer in the state of the capture. The message names the change."""
        change = self._change()
        if change is not None:
            raise RuntimeError(
                f"{operation}: {change} since the capture, which a graph cannot follow: undo this, or create a new "
                f"{operation}"
            )

    def _change(self) -> str | None:
        for name, module, training, children in self._modules:
            if module.training != training:
                return (
                    f"{repr(name) if name else 'the model'} was switched to "
                    f"{'training' if module.training else 'eval'} mode"
                )
            if module._modules != children:
                return f"a module inside {repr(name) if name else 'the model'} was replaced"
        for name, registry, key, tensor, address in self._tensors:
            if registry.get(key) is not tensor or _address(tensor) != address:
                return f"the memory of {name!r} was replaced"
        for name, update, enabled, merged in self._updates:
            if update.enabled != enabled or update.merged != merged:
                return f"the update of {name!r} was merged, unmerged, disabled or enabled"
        return None


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter, nn.Buffer) else 0


def arguments_of(operation: str, example: Any) -> tuple[Any, ...] | dict[Any, Any]:
    """Return an example as a tuple of positional arguments or, if it is a mapping, as a dict of named arguments.

    Raises:
        ValueError: the example is neither a mapping nor a tuple, a list or a single tensor.
    """
    if isinstance(example, Tensor):
        return (example,)
    if isinstance(example, (tuple, list)):
        return tuple(example)
    if isinstance(example, Mapping):
        return dict(example)
    raise ValueError(
        f"{operation}: expected an example of the inputs, a tuple or a mapping of tensors, got {type(example).__name__}"
    )


class Inputs:
    """Hold the tensors from which a graph reads its inputs.

    Args:
        operation: the name in errors.
        example: tensors on any device, in tuples, lists and dictionaries. Other values are constants of the graph.
        device: the device of the graph.
    """

    def __init__(self, operation: str, example: Any, device: torch.device) -> None:
        leaves, self._tree = tree_flatten(example)
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
            raise ValueError(f"{operation}: expected an example with at least one tensor, got {example!r}")
        self._operation = operation
        self._leaves = [leaf.detach().to(device, copy=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    @property
    def value(self) -> Any:
        """The tensors that the graph reads, arranged as in the example."""
        return tree_unflatten(self._leaves, self._tree)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that the graph reads."""
        return [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]

    def fill(self, batch: Any, rows: int | None = None) -> None:
        """Copy a batch into the tensors that the graph reads; with ``rows``, into their first rows.

        Raises:
            ValueError: the batch differs from the example in more than the values of its tensors.
        """
        leaves, tree = tree_flatten(batch)
        if tree != self._tree:
            raise ValueError(
                f"{self._operation}: expected inputs arranged as in the example, {_arrangement(self._tree)}, got "
                f"{_arrangement(tree)}"
            )
        for i, (own, new) in enumerate(zip(self._leaves, leaves, strict=True)):
            if not isinstance(own, Tensor):
                if isinstance(new, Tensor) or new != own:
                    raise ValueError(
                        f"{self._operation}: input {i} is not a tensor, so it is a constant of the graph: expected "
                        f"{own!r} as in the example, got {new!r}"
                    )
                continue
            target = own if rows is None else own[:rows]
            if not isinstance(new, Tensor) or new.shape != target.shape or new.dtype != own.dtype:
                got = f"{list(new.shape)} {new.dtype}" if isinstance(new, Tensor) else type(new).__name__
                raise ValueError(
                    f"{self._operation}: expected a tensor {list(target.shape)} {own.dtype} for input {i} as in the "
                    f"example, got {got}; a graph has fixed sizes (for the last batch of an epoch, use drop_last=True)"
                )
            target.copy_(new, non_blocking=True)


def _arrangement(tree: TreeSpec) -> str:
    return str(tree_unflatten(["*"] * tree.num_leaves, tree)).replace("'*'", "*")


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Restore the states of torch's random generators after the ``with`` block."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
