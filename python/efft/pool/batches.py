"""Check batches with one adapter per sample, and find the rows of each layer input that belong to each sample.

The *rows* of an input are its vectors along the last dimension. A sample has several rows if it consists of tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from efft_kernels.nn.pooled import Layout, Selection

#: A row counts as changed if it changed by more than this share of the largest row. Rounding errors are smaller, and
#: the effect of another input is larger.
_CHANGE = 1e-3

_UNKNOWN, _USUAL = -2, -3


@dataclass
class Layouts:
    """The dimensions that index the samples in the inputs of layers, as far as they are known.

    Attributes:
        of: maps the name of a layer, and the number of dimensions of an input, to the
            :data:`efft_kernels.nn.pooled.Layout`, or to ``_USUAL`` if the first dimension has one entry per sample.
        complete: whether the model has run on inputs from which the layouts of all layers were found.
        attempts: how many more calls of the model try to find them.
    """

    of: dict[str, dict[int, Layout]] = field(default_factory=dict)
    complete: bool = False
    attempts: int = 3

    def learn(
        self,
        layers: Mapping[str, Any],
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        samples: int,
        **options: Any,
    ) -> None:
        """Call :func:`find_layouts` with the arguments after ``layers``, and tell the layers what is known then."""
        find_layouts(model, args, kwargs, samples, self, **options)
        self.tell(layers)  # before other threads see that no attempt is left
        self.attempts = 0 if self.complete else self.attempts - 1

    def tell(self, layers: Mapping[str, Any]) -> None:
        """Set ``layouts`` and ``usual`` of these layers (:class:`efft_kernels.nn.pooled.PooledLinear`)."""
        for name, layer in layers.items():
            known = self.of.get(name, {})
            layer.layouts = {n: layout for n, layout in known.items() if layout != _USUAL}
            layer.usual = frozenset(n for n, layout in known.items() if layout == _USUAL)


@torch.no_grad()
def find_layouts(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    samples: int,
    layouts: Layouts,
    kinds: tuple[type[nn.Module], ...] = (nn.Linear,),
    separate: bool = False,
) -> None:
    """Find the dimension that indexes the samples in the inputs of each layer of ``model`` of one of the ``kinds``.

    The model runs twice: on the given inputs, and on the same inputs with another first sample. The rows of a layer's
    input that change belong to the first sample. Nothing is found if the inputs cannot be changed, if the model does
    not run on them, if the two runs call different layers, or while a CUDA graph is captured.

    Args:
        model: the model, which runs without dropout and without gradients.
        args, kwargs: inputs of the model. The first dimension of each tensor is the batch of ``samples``.
        samples: the number of samples, at least 2.
        layouts: what is known already. The function adds what it finds, and sets ``complete``.
        kinds: the classes of the layers.
        separate: whether no output of a sample may depend on other samples.

    Raises:
        ValueError: ``separate`` is set, and an output of other samples than the first changes.
    """
    device = next(model.parameters()).device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    other_args = tuple(_change_first_sample(x, samples) for x in args)
    other_kwargs = {key: _change_first_sample(x, samples) for key, x in kwargs.items()}
    pairs = zip((*args, *kwargs.values()), (*other_args, *other_kwargs.values()), strict=True)
    if not any(isinstance(a, Tensor) and not torch.equal(a, b) for a, b in pairs):
        return
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:  # eval mode changes quantized layers permanently
            module.training = module.training and isinstance(module, nn.Linear)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            # Copies, because running the model extends a key-value cache.
            first, output = _run(model, *copy.deepcopy((tuple(args), dict(kwargs))), kinds)
            second, other_output = _run(model, *copy.deepcopy((other_args, other_kwargs)), kinds)
    except Exception:  # if the inputs are wrong, the actual call of the model reports the error
        return
    finally:
        for module, mode in modes.items():
            module.training = mode
    if separate:
        _check_separate(output, other_output, samples)
    if [(name, shape) for name, shape, _, _ in first] != [(name, shape) for name, shape, _, _ in second]:
        return
    told = []
    for (name, shape, before, size), (_, _, after, _) in zip(first, second, strict=True):
        if math.prod(shape[:-1]) == samples:  # the layout makes no difference, and the next input may have more rows
            continue
        unchanged = ((after - before).abs() <= _CHANGE * size).all(1)
        layout = _layout(shape, ~unchanged, samples)
        known = layouts.of.setdefault(name, {})
        told.append(layout != _UNKNOWN or len(shape) in known)
        if layout != _UNKNOWN:
            entry = _USUAL if layout == 0 and shape[0] == samples else layout
            earlier = known.get(len(shape), entry)
            if {entry, earlier} == {_USUAL, 0}:
                entry = earlier = 0
            known[len(shape)] = entry if earlier == entry else None
    layouts.complete = bool(told) and all(told)


def _change_first_sample(x: Any, samples: int) -> Any:
    """Return the input with another first sample, or the unchanged input if no other valid sample is known."""
    if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[0] != samples or x.dtype == torch.bool:
        return x
    if not x.is_floating_point():  # for token ids, a permutation of the same sample is valid
        return x if x.dim() == 1 else torch.cat([x[:1].roll(1, -1), x[1:]])
    return torch.cat([0.5 - 1.3 * x[:1].flip(-1), x[1:]]) if bool(x.isfinite().all()) else x


def _check_separate(output: Any, other: Any, samples: int) -> None:
    """Check that two outputs differ only in the first of their samples, which is the first row of each tensor."""
    leaves = (torch.utils._pytree.tree_leaves(of) for of in (output, other))
    for before, after in zip(*leaves, strict=False):
        if not (isinstance(before, Tensor) and before.dim() and before.is_floating_point() and before.numel()):
            continue
        if len(before) != samples or after.shape != before.shape:
            continue
        changed = (after - before).abs().reshape(samples, -1).amax(1) > _CHANGE * before.abs().amax()
        if changed[1:].any():
            raise ValueError(
                f"an output of shape {list(before.shape)} compares the samples of the batch with each other, but they "
                "belong to different models: train the models one by one, or let the model return only outputs of "
                "single samples"
            )


_Run = list[tuple[str, torch.Size, Tensor, Tensor]]


def _run(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], kinds: tuple[type[nn.Module], ...]
) -> tuple[_Run, Any]:
    """Run the model, and return a record of every call of a layer, and the output.

    Each entry of the record is (name of the layer, shape of the input, products of each row with a few fixed vectors
    [rows, vectors], norm of the largest row).
    """
    calls: _Run = []

    def watch(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0]
            rows = x.reshape(-1, x.shape[-1]).float()
            # One product may be nearly equal for different rows.
            steps = torch.tensor([0.7, 1.3, 1.9, 2.6], device=x.device, dtype=torch.float32)
            directions = torch.outer(torch.arange(x.shape[-1], device=x.device), steps).cos()
            calls.append((name, x.shape, rows @ directions, rows.norm(dim=1).amax() if len(rows) else rows.sum()))

        return hook

    layers = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        torch.manual_seed(0)
        output = model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls, output


def _layout(shape: torch.Size, changed: Tensor, samples: int) -> Layout:
    """Return the dimension that indexes the samples in an input, given the rows that changed with the first sample.

    The result is None if no row changed or if no dimension fits. It is ``_UNKNOWN`` if several dimensions fit and none
    of them fits exactly.
    """
    if not changed.any():  # the input may be the same for all samples
        return None
    rows, sizes = math.prod(shape[:-1]), shape[:-1]
    places: dict[int, Tensor] = {}
    if rows % samples == 0:
        number = torch.arange(rows, device=changed.device)
        inner = [dim for dim, size in enumerate(sizes) if dim and size == samples]
        dims = {dim: number // math.prod(sizes[dim + 1 :]) % samples == 0 for dim in inner}
        blocks = {0: number < rows // samples}
        # Different places may have the same rows. A dimension with one entry per sample then also fits longer inputs.
        candidates = {**blocks, **dims} if sizes[0] == samples else {**dims, **blocks}
        for place, of_first in {**candidates, -1: number % samples == 0}.items():
            if not any(torch.equal(of_first, other) for other in places.values()):
                places[place] = of_first
    fitting = [place for place, expected in places.items() if not (changed & ~expected).any()]
    exact = [place for place in fitting if torch.equal(places[place], changed)]
    if not fitting:
        return None
    return exact[0] if exact else fitting[0] if len(fitting) == 1 else _UNKNOWN


def check_batch(
    selected: ContextVar[Selection | None],
    learn: Callable[[tuple[Any, ...], dict[str, Any], int], None],
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Check that a batch has as many samples as adapters were selected. The model runs this as a forward pre-hook.

    Args:
        selected: the selection of the running context. Nothing is checked if all samples use the same adapters.
        learn: called with the inputs and the number of samples, to find the layouts (:func:`find_layouts`).
        model, args, kwargs: the model, and the arguments of its forward.

    Raises:
        ValueError: the first tensor in the inputs has another number of samples.
    """
    selection = selected.get()
    if selection is None or selection.weights is not None:
        return
    batch = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
    if batch is not None and (batch.dim() == 0 or batch.shape[0] != len(selection.slots)):
        raise ValueError(
            f"expected a batch of {len(selection.slots)} samples, one for each name given to AdapterPool.use, got an "
            f"input of shape {list(batch.shape)}"
        )
    if not torch.compiler.is_compiling():
        learn(args, kwargs, len(selection.slots))
