"""Hold many adapters in memory for one frozen model.

A call of the model uses one adapter, a weighted mix of adapters, or one adapter per sample.
"""

from __future__ import annotations

import copy
import functools
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from efft.adapting import buffers, extras
from efft.adapting.adapter import check_not_aside
from efft.adapting.inject import adapted_layers, adapter_of, remove
from efft.adapting.placing import linear_layers
from efft.config import is_number
from efft.hints import did_you_mean
from efft.pool.batches import Layouts, check_batch
from efft.pool.extras import mixed, read_from_stacks, read_own, reads_from_stacks, write_extras
from efft.pool.selecting import FixedBatch, to_device
from efft.pool.stacks import Place, write_row
from efft.pool.twin import find, set_parameters, twin_of
from efft.saving.base import base_problems, describe_base
from efft.saving.io import load_described, read_description
from efft_kernels import FactorBank
from efft_kernels.nn.adapt import read_layers, replace_modules
from efft_kernels.nn.frozen import share_attributes
from efft_kernels.nn.linear import AdaptedLayer
from efft_kernels.nn.pooled import PooledDelta, PooledLinear, PooledWeights, Selection

_Parts = dict[str, tuple[Tensor, Tensor | None]]  # layer -> (D, G) or (weight, bias)


class AdapterPool:
    """Hold named adapters of one model for inference.

    Outside of :meth:`use`, the model computes the outputs of the base model. A layer is replaced when the first adapter
    that changes the layer is added. Names in the state dict do not change.

    For each layer, an adapter has two *operands* D and G, whose product is the update. The operands are computed from
    the factors of the adapter. For each layer the pool stacks the operands of all adapters, in the dtype of the weight:
    D ``[n, in_features, r]`` and G ``[n, r, out_features]``, where n is 1 + ``capacity`` and the first row is for the
    base. Layers share a stack if they share the operand in every adapter (as they do with EFFT's D). Lower ranks are
    padded with zeros to the highest rank. For the linear layers of a head, the pool stores weight and bias.

    The pool also stores trained biases and norms. All samples of a batch must use the same values of these parameters.
    An adapter with trained biases or norms can therefore be used alone or in a mix, but not for single samples of a
    batch.

    Adding and removing adapters changes the stacks in place, so compiled code stays valid. The stacks are created
    again if the capacity is exceeded (it is then doubled), and if a new adapter has a higher rank, adapts a layer that
    no earlier adapter adapts, or does not share an operand between the same layers as the earlier adapters. To replay a
    CUDA graph with other adapters, use :meth:`fixed_batch`. Threads may use different adapters at the same time, while
    other threads add and remove adapters. If several threads call a compiled model, PyTorch may compile it once more
    than necessary, which is rare (pytorch/pytorch#195355).

    Args:
        model: a model that is not adapted, on its final device and in its final dtype. Compile it after adding the
            first adapter.
        capacity: initial number of adapters for which memory is allocated.

    Attributes:
        model: the same model.

    Raises:
        ValueError: the model is already adapted, compiled or in a pool, or ``capacity`` is less than 1.
    """

    def __init__(self, model: nn.Module, capacity: int = 8) -> None:
        if capacity < 1:
            raise ValueError(f"AdapterPool: capacity must be at least 1, got {capacity!r}")
        if any("_orig_mod" in module._modules for module in model.modules()):
            raise ValueError("the model is compiled already: create the pool first, then torch.compile the model")
        if hasattr(model, "efft"):
            raise ValueError(
                "this model is adapted already: a pool needs the plain model; call efft.remove(model) first"
            )
        if any(isinstance(h, functools.partial) and h.func is check_batch for h in model._forward_pre_hooks.values()):
            raise ValueError("this model is in a pool already; call detach() on that pool first")
        self.model = model
        self._twin = twin_of(model)  # a copy of the module tree that shares the parameters, to load adapters into
        self._selected: ContextVar[Selection | None] = ContextVar("selected", default=None)
        self._hook = model.register_forward_pre_hook(
            functools.partial(check_batch, self._selected, self._learn_layouts), prepend=True, with_kwargs=True
        )
        self._layouts = Layouts()
        self._changing = threading.RLock()  # adapters are added one at a time, but calls of the model do not wait
        self._lock = threading.RLock()
        self._rows = capacity + 1  # row 0 belongs to the base
        self._slots: dict[str, int] = {}  # adapter -> its slot, which is its row in the stacks
        self._in_use: Counter[str] = Counter()
        self._fixed: dict[FixedBatch, list[str]] = {}  # fixed batch -> the names of its adapters
        self._layers: dict[str, PooledLinear] = {}
        self._originals: dict[str, nn.Linear] = {}
        self._stacks: dict[Place, Tensor] = {}
        self._trained: dict[str, list[str]] = {}  # adapter -> its trained biases and norms
        self._extras: dict[str, Tensor] = {}  # stacks of their values, by the name of the parameter
        self._readers: dict[str, nn.Module] = {}  # the modules that own these parameters

    @property
    def names(self) -> list[str]:
        """The names of the adapters, in the order in which they were added."""
        return list(self._slots)

    @property
    def bytes_per_adapter(self) -> int:
        """The memory in bytes that each adapter takes in the stacks, including its head."""
        stacks = {id(stack): stack for stack in (*self._stacks.values(), *self._extras.values())}
        return sum(stack[0].numel() * stack.element_size() for stack in stacks.values())

    def load(self, name: str, folder: str | os.PathLike[str], strict: bool = True) -> None:
        """Add the adapter that :func:`efft.save_adapter` wrote to ``folder``.

        Before anything is changed, the adapter is checked as in :func:`efft.load_adapter`, with the same ``strict``.

        Raises:
            FileNotFoundError, ValueError: as in :func:`efft.load_adapter` and :meth:`add`.
        """
        with self._changing, torch.inference_mode(False):
            self._check_new(name)
            while not self._load(name, Path(folder), strict):
                pass

    def _load(self, name: str, folder: Path, strict: bool) -> bool:
        """Load an adapter. If another process has replaced its files meanwhile, change nothing and return False."""
        description = read_description(folder)
        buffers.check_none(name, description["buffers"] or ())
        heads = {h: m for h in description["head"] if (m := find(self._twin, h)) is not None}
        shared = {n: p for n, p in self._twin.named_parameters() if n in set(description["extras"])}
        try:
            for head, module in heads.items():  # _twin shares the model's parameters, so load into copies
                self._twin.set_submodule(head, copy.deepcopy(module))
            set_parameters(self._twin, {n: nn.Parameter(p.detach().clone()) for n, p in shared.items()})
            loaded = load_described(self._twin, folder, description, strict)
            if loaded:
                self._insert(name, self._twin)
            return loaded
        finally:
            if hasattr(self._twin, "efft"):
                remove(self._twin)
            set_parameters(self._twin, shared)
            for head, module in heads.items():
                self._twin.set_submodule(head, module)

    def add(self, name: str, adapted: nn.Module) -> None:
        """Add a copy of the adapter of ``adapted``, a model of the same base that :func:`efft.apply` adapted.

        Raises:
            ValueError: ``name`` is taken; or ``adapted`` is not adapted, has another base, is adapted by a method that
                does not update weights, has adapted weights other than those of linear layers, has buffers (statistics
                of batch norms) that training has changed, or has a head that does not consist of linear layers like
                those of the model.
            RuntimeError: the adapter needs new stacks while a fixed batch exists (:meth:`fixed_batch`), or ``adapted``
                is within a block of :func:`efft.disabled` that has replaced biases, norms or buffers.
        """
        with self._changing, torch.inference_mode(False):  # inference tensors could not be written later
            self._check_new(name)
            adapter = adapter_of(adapted)
            check_not_aside(adapter, "AdapterPool.add")
            buffers.check_none(name, buffers.changed(adapted, adapter.head, adapter._base_buffers))
            layers = adapter.layers
            linear_layers(adapted_layers(adapted))
            missing = [n for n in layers if find(self._twin, n) is None]
            problems = [f"the model has no {', '.join(missing[:3])}"] if missing else []
            problems = problems or base_problems(self._twin, layers, describe_base(adapted, layers))
            own = dict(self._twin.named_parameters())
            trained = extras.parameters_of(adapted, adapter.extras)
            problems += [
                f"the model has no {n} of shape {list(p.shape)}"
                for n, p in trained.items()
                if n not in own or own[n].shape != p.shape
            ]
            if problems:
                raise ValueError(f"adapter {name!r} does not fit the model of this pool: {'; '.join(problems)}")
            self._insert(name, adapted)

    def add_mix(self, name: str, weights: Mapping[str, float]) -> None:
        """Add the weighted sum of adapters of this pool as another adapter.

        The update of the mix is the weighted sum of the updates, rounded to the dtype of the weights. The rank of the
        mix is the sum of the ranks. The head of the mix is the base's head plus the weighted sum of the differences
        between the heads and the base's head. Trained biases and norms are summed like the head. The mix does not
        change when its parts are removed. A mix cannot be saved to a file: keep ``weights`` and the folders of the
        adapters, and create the mix again.

        Raises:
            ValueError: ``name`` is taken, ``weights`` is not a mapping or is empty, or :meth:`use` refuses an adapter
                or a weight.
            RuntimeError: the mix needs new stacks while a fixed batch exists (:meth:`fixed_batch`).
        """
        if not isinstance(weights, Mapping):
            raise ValueError(f"AdapterPool.add_mix: expected {{name: weight, ...}}, got {weights!r}")
        with self._changing, torch.inference_mode(False), torch.no_grad(), self._lock:
            self._check_new(name)
            selection, _ = self._select(weights)
            assert selection is not None
            assert selection.weights is not None
            updates: _Parts = {}
            heads: _Parts = {}
            shared: dict[int, Tensor] = {}
            for layer, pooled in self._layers.items():
                first, second = pooled.mixed(selection.slots, selection.weights)
                if second is None or isinstance(pooled, PooledWeights):
                    heads[layer] = first, second
                    continue
                used = first.any(0)  # without the zeros that pad lower ranks
                updates[layer] = shared.setdefault(id(pooled.stacks[0]), first[:, used]), second[used]
            trained = {n for part in weights for n in self._trained.get(part, ())}
            values = {n: mixed(self._extras[n], selection.slots, selection.weights) for n in sorted(trained)}
            self._write(name, updates, heads, values)

    def remove(self, name: str) -> None:
        """Remove an adapter. The next adapter that is added uses its memory.

        Raises:
            ValueError: the pool has no adapter with this name.
            RuntimeError: the adapter is in use, in a block of :meth:`use` or in a fixed batch.
        """
        with self._lock:
            self._slot(name)
            if self._in_use[name]:
                raise RuntimeError(
                    f"adapter {name!r} is in use: before removing it, leave the with blocks that use it, and "
                    "select other adapters in fixed batches"
                )
            del self._slots[name]
            self._trained.pop(name, None)

    @contextmanager
    def use(
        self, adapters: str | Mapping[str, float] | Sequence[str | None] | FixedBatch | None
    ) -> Iterator[nn.Module]:
        """Compute with these adapters within the ``with`` block, in this thread, without gradients.

        Args:
            adapters: selects the adapters of the samples.

                - With a name, all samples use this adapter.
                - With ``{name: weight, ...}``, all samples use the weighted sum of these adapters, as defined in
                  :meth:`add_mix`.
                - With a list of names, each sample has its own adapter, or the base for None. Sample i is entry i of
                  the first dimension of the batch. The first call of the model with a list of several names runs the
                  base two more times, to find which dimension of each layer's input indexes the samples. If its inputs
                  leave this open, up to two more calls do the same. Compiled code does not do this.
                - With a :meth:`fixed_batch`, each sample uses the adapter that was selected for it last.
                - With None, all samples use the base.

        Raises:
            ValueError: an adapter does not exist, the list or mix is empty, a weight is not a finite number, or an
                adapter in a list has its own biases or norms. A call of the model raises this error if the batch has
                another size, or if a layer mixes samples or its input does not show where they are.
        """
        with self._lock:
            selection, names = self._select(adapters)
            self._in_use.update(names)
        token = self._selected.set(selection)
        try:
            with torch.no_grad():
                yield self.model
        finally:
            self._selected.reset(token)
            with self._lock:
                self._in_use.subtract(names)

    def fixed_batch(self, samples: int) -> FixedBatch:
        """Return a batch whose adapters can be exchanged between the replays of a CUDA graph (:class:`FixedBatch`).

        Capture the graph after at least one adapter was added and the model has run once within ``use(batch)``.
        Adapters that are added later can be selected without a new capture. While a fixed batch exists, the pool
        therefore refuses an adapter for which it would need new stacks: an adapter beyond the ``capacity``, with a
        higher rank or with additional layers, or one that does not share operands between the same layers. Call
        :meth:`release` before adding such an adapter, and capture the graph again afterwards.

        Raises:
            ValueError: ``samples`` is less than 1, or the pool has no adapter.
        """
        if samples < 1 or not self._layers:
            raise ValueError(
                f"AdapterPool.fixed_batch: expected at least 1 sample and a pool with an adapter, got "
                f"{samples} samples and {len(self._slots)} adapters"
            )
        batch = FixedBatch(samples, next(self.model.parameters()).device, self._choose)
        with self._lock:
            self._fixed[batch] = []
        return batch

    def release(self, batch: FixedBatch) -> None:
        """End a fixed batch. Graphs that were captured with the batch must not be replayed any more.

        Raises:
            ValueError: the pool has no such batch.
        """
        with self._lock:
            if batch not in self._fixed:
                raise ValueError("AdapterPool.release: expected a fixed batch of this pool that was not released yet")
            self._in_use.subtract(self._fixed.pop(batch))

    def _choose(self, batch: FixedBatch, names: Sequence[str | None]) -> list[int]:
        """Mark the adapters of a fixed batch as in use, and return their slots."""
        with self._lock:
            if batch not in self._fixed:
                raise RuntimeError("this fixed batch was released: create another one with AdapterPool.fixed_batch")
            slots, chosen = self._slots_of(names)
            self._in_use.update(chosen)
            self._in_use.subtract(self._fixed[batch])
            self._fixed[batch] = chosen
            return slots

    def detach(self) -> nn.Module:
        """End the pool: restore the original layers of the model exactly, and return the model.

        Raises:
            RuntimeError: an adapter is in use, or a fixed batch was not released.
        """
        with self._changing, self._lock:
            if self._fixed:
                raise RuntimeError(
                    f"{len(self._fixed)} fixed batches exist: call release(batch) for each of them first"
                )
            for name in self.names:
                self.remove(name)
            for module in self._readers.values():
                read_own(module)
            for name, layer in self._layers.items():
                original = self._originals[name]
                for part in ("weight", "bias"):
                    original.register_parameter(part, layer._parameters[part])
                share_attributes(layer, original)
            replace_modules(self.model, {layer: self._originals[name] for name, layer in self._layers.items()})
            self._layers, self._stacks, self._extras, self._readers = {}, {}, {}, {}
            self._hook.remove()
            return self.model

    def _learn_layouts(self, args: tuple[Any, ...], kwargs: dict[str, Any], samples: int) -> None:
        """Find which dimension of each layer's input indexes the samples, in the first calls with a list."""
        if samples < 2 or self._layouts.attempts < 1:
            return
        with self._changing:
            if self._layouts.attempts > 0:  # otherwise, another thread was faster
                self._layouts.learn(self._layers, self._twin, args, kwargs, samples)

    def _select(
        self, adapters: str | Mapping[str, float] | Sequence[str | None] | FixedBatch | None
    ) -> tuple[Selection | None, list[str]]:
        """Return the selection for an argument of :meth:`use`, and the names of the selected adapters."""
        parameter = next(self.model.parameters())
        device = parameter.device
        if adapters is None:
            return None, []
        if isinstance(adapters, FixedBatch):
            if adapters not in self._fixed:
                raise ValueError("AdapterPool.use: expected a fixed batch of this pool that was not released")
            return Selection(adapters.slots, None), []
        if isinstance(adapters, str):
            adapters = {adapters: 1.0}
        if not adapters:
            raise ValueError(
                "AdapterPool.use: expected a name, {name: weight} or one name per sample, got nothing; use(None) "
                "selects the base"
            )
        if not isinstance(adapters, Mapping):
            slots, names = self._slots_of(adapters)
            return Selection(to_device(slots, torch.int64, device), None), names
        slots, weights = [self._slot(name) for name in adapters], list(adapters.values())
        if not all(map(is_number, weights)):
            raise ValueError(f"AdapterPool.use: expected a finite weight for each adapter, got {dict(adapters)}")
        if sum(weights) != 1:  # the base's head gets the remaining weight
            slots, weights = [*slots, 0], [*weights, 1 - sum(weights)]
        wide = torch.promote_types(parameter.dtype, torch.float32)
        return Selection(to_device(slots, torch.int64, device), to_device(weights, wide, device)), [*adapters]

    def _slots_of(self, adapters: Sequence[str | None]) -> tuple[list[int], list[str]]:
        """Return the slot of each sample's adapter, and the names of the adapters, each once."""
        slots = [0 if name is None else self._slot(name) for name in adapters]
        own = next((name for name in adapters if name in self._trained), None)
        if own is not None:
            raise ValueError(
                f"adapter {own!r} has biases or norms of its own (such as {self._trained[own][0]}), but all samples "
                f"of a batch share these: use it for whole batches (use({own!r})), or train adapters for single "
                "samples with bias='none' and norms=False"
            )
        return slots, [name for name in set(adapters) if name is not None]

    def _slot(self, name: str) -> int:
        if name not in self._slots:
            raise ValueError(f"no adapter {name!r} in this pool: {did_you_mean(name, self._slots)}")
        return self._slots[name]

    def _check_new(self, name: str) -> None:
        if not isinstance(name, str) or name in self._slots:
            raise ValueError(f"expected a name that no adapter of this pool has, got {name!r}; remove that one first")

    @torch.no_grad()
    def _insert(self, name: str, adapted: nn.Module) -> None:
        """Add an adapter. If it does not fit, at most a free row changes, and the pool still serves the others."""
        trained = extras.parameters_of(adapted, adapter_of(adapted).extras)
        parts = _operands(adapted), self._head_layers(adapted), {n: p.detach() for n, p in trained.items()}
        with self._lock:
            self._write(name, *parts)

    def _write(self, name: str, operands: _Parts, heads: _Parts, trained: Mapping[str, Tensor]) -> None:
        """Write an adapter to a free row of the stacks."""
        layers, originals = dict(self._layers), dict(self._originals)
        for layer, kind in (dict.fromkeys(operands, PooledDelta) | dict.fromkeys(heads, PooledWeights)).items():
            if layer not in layers:
                originals[layer] = _linear(self.model, layer)
                if reads_from_stacks(originals[layer]):
                    raise ValueError(
                        f"adapter {name!r} updates {layer!r}, of which an earlier adapter only trained the bias: add "
                        "the adapters that update more layers first, or use one pool per adapter"
                    )
                layers[layer] = kind(originals[layer], self._selected)
            if not isinstance(layers[layer], kind):
                raise ValueError(
                    f"{layer!r} belongs to the head of one adapter and is updated by another: use one pool per adapter"
                )
        whole = tuple(f"{n}." for n, layer in layers.items() if isinstance(layer, PooledWeights))
        both = next((n for n in (*self._extras, *trained) if n.startswith(whole)), None)
        if both is not None:
            raise ValueError(
                f"{both!r} belongs to the head of one adapter and to the biases or norms of another: use one pool per "
                "adapter"
            )
        parts = {(n, part): t for n, pair in (operands | heads).items() for part, t in enumerate(pair) if t is not None}
        taken = set(self._slots.values())
        slot = next(i for i in range(1, len(taken) + 2) if i not in taken)
        rows = self._rows if slot < self._rows else 2 * self._rows - 1
        stacks = write_row(self._stacks, parts, layers, slot, rows)
        moved = [place for place, stack in stacks.items() if stack is not self._stacks.get(place)]
        if moved and self._fixed:  # so far only a free row has changed
            raise RuntimeError(
                f"adapter {name!r} needs new stacks (for example for {moved[0][0]!r}), but graphs captured with a "
                "fixed batch read the old stacks. Expected an adapter with the layers, ranks and shared operands of an "
                f"earlier one, and at most {self._rows - 1} adapters: create the pool with a larger capacity, add the "
                "adapter with the largest ranks first, or release the fixed batches and capture the graphs again"
            )
        for layer, pooled in layers.items():
            pooled.stacks = (stacks[layer, 0], stacks.get((layer, 1)))
        self._layouts.tell(layers)
        new: dict[nn.Module, nn.Module] = {originals[n]: layers[n] for n in layers if n not in self._layers}
        if new:
            replace_modules(self.model, new)
            for _, pooled, _ in read_layers(self.model, PooledLinear):  # type: ignore[type-abstract]
                pooled.read = True
        self._originals, self._layers, self._stacks, self._rows = originals, layers, stacks, rows
        self._write_extras(trained, slot)
        self._slots[name] = slot
        if trained:
            self._trained[name] = list(trained)

    def _write_extras(self, trained: Mapping[str, Tensor], slot: int) -> None:
        """Write the biases and norms of an adapter, and make their modules read them from the stacks."""
        if not self._extras and not trained:
            return
        own = dict(self.model.named_parameters())
        base = {name: own[name].detach() for name in (*self._extras, *trained)}
        self._extras = write_extras(self._extras, trained, base, slot, self._rows)
        of_modules: dict[str, dict[str, Tensor]] = {}
        for name, stack in self._extras.items():
            owner, _, parameter = name.rpartition(".")
            of_modules.setdefault(owner, {})[parameter] = stack
        for owner, stacks in of_modules.items():
            self._readers[owner] = self.model.get_submodule(owner)
            read_from_stacks(self._readers[owner], stacks, self._selected)

    def _head_layers(self, adapted: nn.Module) -> _Parts:
        """Return the weight and bias of every linear layer in the head of ``adapted``."""
        found: _Parts = {}
        for head in adapter_of(adapted).head:
            for inner, module in adapted.get_submodule(head).named_modules():
                name = f"{head}.{inner}" if inner else head
                if not module.state_dict(keep_vars=True) or any(module.children()):
                    continue
                ours = find(self._twin, name)
                if type(module) is not nn.Linear or type(ours) is not nn.Linear:
                    raise ValueError(
                        f"expected a head of nn.Linear layers, got {name!r}: {type(module).__name__} (in the model "
                        f"{type(ours).__name__}); exclude it from the head when you adapt the model (head=[...])"
                    )
                if module.weight.shape != ours.weight.shape or (module.bias is None) != (ours.bias is None):
                    raise ValueError(f"expected {name!r} to be {ours} as in the model of this pool, got {module}")
                found[name] = (module.weight, module.bias)
        return found


def _operands(adapted: nn.Module) -> _Parts:
    """Return D and G of every adapted layer. Layers that share an operand get the same tensor."""
    together: dict[nn.Module, dict[str, AdaptedLayer]] = {}
    for name, layer in linear_layers(adapted_layers(adapted)).items():
        together.setdefault(layer.factors, {})[name] = layer
    found: _Parts = {}
    for factors, layers in together.items():
        next(iter(layers.values())).evaluated()  # raises for a method that does not update weights
        assert isinstance(factors, FactorBank)
        found |= zip(layers, factors.evaluated_together([layer.site for layer in layers.values()]), strict=True)
    return found


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = find(model, name)
    if not isinstance(layer, nn.Linear):
        kind = "parameter outside of a linear layer" if layer is None else type(layer).__name__
        raise ValueError(f"an AdapterPool serves only adapters of linear layers, but {name!r} is a {kind}")
    return layer
