"""Define :func:`graph_serve`, which captures the forward pass of a model as CUDA graphs for several batch sizes."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from efft.adapting import buffers
from efft.adapting.inject import adapted_layers, adapter_of, disabled
from efft.graphs import capture as capturing
from efft.graphs.capture import Constants, Graphs, Inputs, arguments_of, capture, device_of, random_state_kept
from efft.pool.batches import check_batch

_NAME = "graph_serve"


def graph_serve(
    model: nn.Module,
    example: Any,
    batches: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    *,
    without_adapter: bool = False,
    autocast: torch.dtype | None = None,
) -> GraphServer:
    """Capture the forward pass of ``model`` for each number of samples in ``batches``.

    A call with n samples copies them to the inputs of the smallest graph for at least n samples, launches the graph,
    and returns the first n rows of its outputs. The other rows contain earlier samples, and their outputs are dropped.
    If n is more than the largest number in ``batches``, several launches compute the outputs. The graphs compose the
    update from the factors, so they see new values of the factors, whether an optimizer or ``load_state_dict`` wrote
    them. After any change that the graphs cannot follow, such as another mode, a merged update or replaced parameters,
    the next call raises an error.

    Args:
        model: a model in eval mode on one GPU, adapted or not. The outputs of a sample must not depend on the other
            samples; this is checked.
        example: the inputs for one or more samples: a tuple of tensors, or a mapping for named arguments. The first
            dimension of every tensor indexes the samples. Values that are not tensors become constants of the graphs.
        batches: the numbers of samples for which graphs are captured.
        without_adapter: whether to capture graphs without the update as well, for calls with ``adapter=False``.
        autocast: dtype of mixed precision; None for none.

    Returns:
        A function from the inputs of any number of samples to the outputs of the model.

    Raises:
        ValueError: the model or the example cannot be used; the message states the reason.
        RuntimeError: the forward pass cannot be captured; the message contains torch's reason.
    """
    sizes = sorted(set(batches))
    if not sizes or any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError(f"{_NAME}: batches must be numbers of samples of at least 1, got {list(batches)}")
    device = device_of(_NAME, model)
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        raise ValueError(
            f"{_NAME}: expected a model in eval mode, but {repr(training) if training else 'the model'} is in training "
            "mode: call model.eval() first"
        )
    if any(isinstance(h, functools.partial) and h.func is check_batch for h in model._forward_pre_hooks.values()):
        raise ValueError(
            f"{_NAME}: this model is in an AdapterPool, which chooses the adapters on the host: capture your "
            "own graph with the pool's fixed_batch, or call detach() on the pool first"
        )
    if without_adapter:
        _check_can_be_disabled(model)
    return GraphServer(model, example, sizes, device, without_adapter, autocast)


def _check_can_be_disabled(model: nn.Module) -> None:
    """Raise ValueError if the adapter cannot be disabled, or if it also changes memory that a base graph would read."""
    if not hasattr(model, "efft"):
        raise ValueError(f"{_NAME}: without_adapter needs an adapted model, got one without an adapter")
    adapter = adapter_of(model)
    if any(update.merged for update in adapted_layers(model).values()):
        raise ValueError(f"{_NAME}: without_adapter needs an update that is not merged: call efft.unmerge(model) first")
    if adapter.extras or buffers.changed(model, adapter.head, adapter._base_buffers):
        raise ValueError(
            f"{_NAME}: without_adapter needs a model that differs from its base in the update and the head only, but "
            "the adapter also trained biases, norms or statistics, which lie in the memory of the base: serve the base "
            "model from a copy"
        )


class GraphServer:
    """Serve requests from CUDA graphs. :func:`graph_serve` creates objects of this class."""

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        sizes: Sequence[int],
        device: torch.device,
        without_adapter: bool,
        autocast: torch.dtype | None,
    ) -> None:
        self._model, self._autocast, self._device = model, autocast, device
        self._sizes = list(sizes)
        graphs = capturing.graphs_on(device)
        example = tree_map_only(Tensor, lambda t: t.to(device), arguments_of(_NAME, example))
        _samples_of(example)
        self._buckets: dict[bool, dict[int, _Bucket]] = {}
        with random_state_kept(device), torch.inference_mode(False), torch.no_grad():
            for adapter in (True, False) if without_adapter else (True,):
                with nullcontext() if adapter else disabled(model):
                    # The largest graph comes first: smaller ones then fit in the memory that it has allocated.
                    self._buckets[adapter] = {
                        size: _Bucket(size, example, self._run, graphs, device) for size in reversed(self._sizes)
                    }
        self._constants = Constants(model)

    @property
    def sizes(self) -> list[int]:
        """Numbers of samples for which there is a graph, in ascending order."""
        return list(self._sizes)

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, *args: Any, adapter: bool = True, **kwargs: Any) -> Any:
        """Return the outputs of the model for the inputs, which are arranged as in the example.

        Args:
            args, kwargs: tensors for the same number of samples, on any device.
            adapter: whether to compute with the update.

        Returns:
            New tensors on the GPU, arranged as the model's outputs.

        Raises:
            TypeError: positional and named arguments are mixed.
            ValueError: the inputs have other sizes, dtypes or constants than the example, or there is no graph without
                the adapter.
            RuntimeError: something changed since the capture that the graphs cannot follow.
        """
        if args and kwargs:
            raise TypeError(f"{_NAME}: pass the inputs either by position or by name, as the example is arranged")
        if adapter not in self._buckets:
            raise ValueError(f"{_NAME}: there is no graph without the adapter: pass without_adapter=True to {_NAME}")
        self._constants.check(_NAME)
        inputs: Any = kwargs or args
        n, largest = _samples_of(inputs), self._sizes[-1]
        parts = []
        for first in range(0, n, largest):
            rows = slice(first, min(n, first + largest))
            size = next(size for size in self._sizes if size >= rows.stop - rows.start)
            part = inputs if rows == slice(0, n) else tree_map_only(Tensor, operator.itemgetter(rows), inputs)
            parts.append(self._buckets[adapter][size].run(part, rows.stop - rows.start))
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _run(self, inputs: Any) -> Any:
        with torch.autocast(self._device.type, self._autocast, enabled=self._autocast is not None, cache_enabled=False):
            return self._model(**inputs) if isinstance(inputs, Mapping) else self._model(*inputs)


class _Bucket:
    """Hold one graph: the forward pass for a fixed number of samples.

    Raises:
        ValueError: an output has no row for each sample, or a sample changes the outputs of another one.
        RuntimeError: the forward pass cannot be captured.
    """

    def __init__(
        self, size: int, example: Any, forward: Callable[[Any], Any], graphs: Graphs, device: torch.device
    ) -> None:
        self._size = size
        repeated = tree_map_only(Tensor, lambda t: _repeated(t, size), example)
        self._inputs = Inputs(_NAME, repeated, device)
        outputs: list[tuple[list[Any], TreeSpec]] = []
        graphs.warm_up(lambda: outputs.append(tree_flatten(forward(self._inputs.value))))
        values, self._tree = outputs[0]
        for i, value in enumerate(values):
            if isinstance(value, Tensor) and (value.dim() == 0 or value.shape[0] != size):
                raise ValueError(
                    f"{_NAME}: expected outputs with one row for each of {size} samples, got shape {list(value.shape)} "
                    f"for output {i}"
                )
        self._outputs = [torch.empty_like(v) if isinstance(v, Tensor) else v for v in values]

        def run() -> None:
            found, _ = tree_flatten(forward(self._inputs.value))
            for own, value in zip(self._outputs, found, strict=True):
                if isinstance(own, Tensor):
                    own.copy_(value)

        graphs.warm_up(run)
        self._check_rows_are_independent(run, graphs)
        self._replay = capture(graphs, run, f"{_NAME}: the forward pass of {size} samples")

    def _check_rows_are_independent(self, run: Callable[[], None], graphs: Graphs) -> None:
        """Change all samples but the first, and compare the outputs of the first one."""
        if self._size == 1:
            return
        before = [v[0].clone() for v in self._outputs if isinstance(v, Tensor)]
        kept = [t[1:].clone() for t in self._inputs.tensors]
        for t in self._inputs.tensors:
            # Zeros are valid indices too, if the tensor contains tokens.
            t[1:].zero_()
        graphs.warm_up(run)
        after = [v[0] for v in self._outputs if isinstance(v, Tensor)]
        for i, (one, other) in enumerate(zip(before, after, strict=True)):
            if not torch.allclose(one.double(), other.double(), rtol=1e-3, atol=1e-3 * float(one.double().abs().max())):
                raise ValueError(
                    f"{_NAME}: output {i} of a sample depends on the other samples of its batch, so it would also "
                    "depend on the data of an earlier request: serve this model without a graph"
                )
        for t, rows in zip(self._inputs.tensors, kept, strict=True):
            t[1:].copy_(rows)

    def run(self, inputs: Any, n: int) -> Any:
        """Return the outputs for n samples, which may be fewer than the graph computes."""
        self._inputs.fill(inputs, n)
        self._replay()
        return tree_unflatten([v[:n].clone() if isinstance(v, Tensor) else v for v in self._outputs], self._tree)


def _repeated(tensor: Tensor, size: int) -> Tensor:
    """Return ``size`` rows of a tensor. If the tensor has fewer rows, they are repeated, starting with the first."""
    return tensor[torch.arange(size, device=tensor.device) % tensor.shape[0]]


def _samples_of(inputs: Any) -> int:
    """Return the number of samples in the inputs. Raise ValueError if it is 0 or not the same in all tensors."""
    shapes = [tuple(leaf.shape) for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor)]
    samples = {shape[0] if shape else 0 for shape in shapes}
    if len(samples) != 1 or 0 in samples:
        raise ValueError(
            f"{_NAME}: expected tensors whose first dimension indexes the same number of samples, at least one, got "
            f"shapes {[list(shape) for shape in shapes]}"
        )
    return samples.pop()


def _joined(parts: Sequence[Any]) -> Any:
    """Join the outputs of several launches along the samples."""
    flat = [tree_flatten(part) for part in parts]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    return tree_unflatten([torch.cat(c) if isinstance(c[0], Tensor) else c[0] for c in columns], flat[0][1])


__all__ = ["GraphServer", "graph_serve"]
