"""``FactorBank``: the base of all banks of factors, with the layers that a bank serves and the passes they run in."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import _symbolic_trace

from efft_kernels._arguments import no_autocast

Operands = tuple[Tensor, ...]
"""What a layer multiplies by: (D, G), or more tensors if the update of a site is a product of more."""

#: Whether torch.fx traces. In a newer torch the older name warns that it has another meaning.
_is_traced = getattr(_symbolic_trace, "is_fx_symbolic_tracing", None) or _symbolic_trace.is_fx_tracing


class Binding:
    """The hold of one layer on a bank: its site and, between :meth:`FactorBank.prepare` and ``release``, its operands.

    A layer finds everything through this object, not through an index into a list, so that torch.compile can reuse one
    graph for all blocks of a model.

    Attributes:
        site: the part of the bank that the layer uses.
        prepared: the operands of the running pass; None outside of a pass.
        used: whether the factors had an effect in the running pass, or in the last one.
        read: whether a module has ever read the weight with the update instead of calling the layer.
        dense: whether such a read has ever made a dense copy of the weight.
        merged: whether the update is in the weight, so that a graph of torch.fx must not add it again.
    """

    def __init__(self, site: Any) -> None:
        self.site = site
        self.prepared: Operands | None = None
        self.used = self.read = self.dense = False
        self.merged = False

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles are made between passes, so they do not get what belongs to a running one.
        return {**self.__dict__, "prepared": None}


class FactorBank(nn.Module, ABC):
    """The factors of many linear layers, owned once, for any method whose update of a layer is ``ΔW = D G``.

    A subclass owns parameters and defines its sites: any value that identifies a layer's part of the bank. It says in
    :meth:`features` which linear layer a site fits, and in :meth:`compose` what its operands are. Frozen tensors that
    an adapter must carry are persistent buffers of the bank.

    Layers do not own factors: they :meth:`bind` a site and ask for its :meth:`down_up` pair. Outside of a pass, each
    call of a layer composes its own pair. :meth:`prepare` composes all bound sites at once for the forward pass that
    follows, until :meth:`release` (``efft.apply`` registers hooks on the model that call both).
    """

    _lock = threading.Lock()  # one for all banks: it is held for an instant, and cannot be copied or pickled
    dropout: float = 0.0
    """Probability of zeroing an element of a factor in training. It is up to :meth:`compose` to do it."""

    def __init__(self) -> None:
        super().__init__()
        self.bindings: list[Binding] = []
        self._passes: list[weakref.ref[_Pass]] = []  # the graphs hold them
        self._without_graph: _Pass | None = None  # the last pass, if none of its factors needs a gradient
        self._running: _Pass | None = None  # between prepare and release, if gradients are wanted
        self._thread: int | None = (
            None  # the thread whose pass this is; layers in other threads compose their own meanwhile
        )

    @abstractmethod
    def features(self, site: Any) -> tuple[int, int]:
        """Return (in_features, out_features) of a linear layer that ``site`` fits."""

    @abstractmethod
    def compose(self, sites: Sequence[Any]) -> Sequence[Operands]:
        """Return (D [in_features, r], G [r, out_features]) of each site, differentiable in the factors.

        The scale is in one of the two. Autocast is off during the call: the factors are tiny, and rounding them would
        round the update. A site that stands for many matrices may have other operands (:meth:`TTFactors.compose`).
        """

    def describe(self, site: Any) -> str:
        """Describe the site in the words of this bank, for the ``repr`` of the layer that uses it."""
        return f"{type(self).__name__}, site={site}"

    def bind(self, site: Any) -> Binding:
        """Register a layer that uses ``site``, and return what to pass to :meth:`down_up`."""
        self.bindings.append(Binding(site))
        return self.bindings[-1]

    def down_up(self, binding: Binding) -> Operands:
        """Return the operands of a bound site as :meth:`compose` gives them, with the dropout of this pass in training.

        In general these are (D [in_features, r], G [r, out_features]).
        """
        prepared = binding.prepared  # read once: another thread may release it
        if prepared is not None and (torch.compiler.is_compiling() or self._thread == threading.get_ident()):
            if not torch.compiler.is_compiling():  # a compiled checkpoint refuses side effects
                binding.used = True
                if self._running is not None and not torch.is_grad_enabled():
                    self._running.without_grad.add(binding)
            return prepared
        if not torch.compiler.is_compiling():
            if _is_traced():
                return self._traced(binding)
            node = torch._C._current_autograd_node()
            if node is not None:  # activation checkpointing runs the layer again, inside the backward pass
                return self._replay(node, binding)
        return self._composed([binding.site])[0]

    def forward(self, which: Any) -> Any:
        """Return (D, G) of the binding number ``which``, or for a list of sites the operands of each.

        The first form has dropout in training, and G is zero while the layer is merged. It is for graphs of torch.fx,
        in which the bank is a module that is called. The second form is for libraries that make parameters whole while
        their module is called, and again in its backward (ZeRO-3). Layers call :meth:`down_up`.
        """
        if isinstance(which, list):
            # Parameters lose their content after the call; tensors made from them keep theirs.
            aliases = {id(p): p.view_as(p) for p in self.parameters()}
            return [tuple(aliases.get(id(t), t) for t in operands) for operands in self.compose(which)]
        binding = self.bindings[which]
        D, G = self._composed([binding.site])[0]
        return D, torch.zeros_like(G) if binding.merged else G

    def _traced(self, binding: Binding) -> tuple[Tensor, Tensor]:
        """Return a call of this bank in the graph that torch.fx traces, which keeps modules of torch.nn whole."""
        self.__dict__["__module__"] = "torch.nn"
        try:
            pair = self(self.bindings.index(binding))
        finally:
            del self.__dict__["__module__"]
        return pair[0], pair[1]

    def evaluated(self, site: Any) -> tuple[Tensor, Tensor]:
        """Return (D, G) of a site from the factors as they are now, without dropout."""
        return self.evaluated_together([site])[0]

    def evaluated_together(self, sites: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
        """Return (D, G) of several sites, as :meth:`evaluated`; what the method shares between them is one tensor."""
        training, self.training = self.training, False
        try:
            operands = self._composed(list(sites))
            with no_autocast(next(self.parameters()).device):
                return [self.pair(site, *factors) for site, factors in zip(sites, operands, strict=True)]
        finally:
            self.training = training

    def pair(self, site: Any, D: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        """Return (D, G) of a site from the operands that :meth:`compose` gives for it."""
        (G,) = rest
        return D, G

    def prepare(self) -> None:
        """Compose all bound sites at once; :meth:`down_up` returns them to this thread until :meth:`release`."""
        if not torch.compiler.is_compiling():
            with self._lock:
                if self._thread not in (None, threading.get_ident()):
                    return
                self._thread = threading.get_ident()
        pairs = self._composed([binding.site for binding in self.bindings])
        for binding, pair in zip(self.bindings, pairs, strict=True):
            binding.prepared = pair
        if torch.compiler.is_compiling():
            return
        for binding in self.bindings:
            binding.used = False
        # Inside torch.func there is no backward pass in which a layer could run again.
        graph = torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()
        self._running = self._remember(pairs) if graph else None

    def release(self) -> list[Binding]:
        """End the forward pass that :meth:`prepare` began, and return the bindings that it did not use."""
        if not torch.compiler.is_compiling() and self._thread != threading.get_ident():
            return []
        for binding in self.bindings:
            binding.prepared = None
        if torch.compiler.is_compiling():
            return []
        if self._running is not None:
            self._running.last, self._running = _sequence_number(), None
        self._thread = None
        return [binding for binding in self.bindings if not binding.used]

    def _composed(self, sites: list[Any]) -> Sequence[Operands]:
        if not torch.compiler.is_compiling() and any(hasattr(p, "full_tensor") for p in self.parameters()):
            raise RuntimeError(
                f"the factors of this {type(self).__name__} are sharded (DTensor). fully_shard makes them whole while "
                "the module runs that they are part of: shard the whole adapted model, not its factors on their own, "
                "and call it as a whole; to merge or export, save the adapter and load it into a plain model"
            )
        with no_autocast(next(self.parameters()).device):
            if self._forward_pre_hooks and not torch.compiler.is_compiling():
                return self(sites)
            return self.compose(sites)

    def _remember(self, pairs: Sequence[Operands]) -> _Pass:
        """Keep the values of a pass as long as its graph lives, for layers that run again inside its backward pass."""
        this = _Pass(dict(zip(self.bindings, (tuple(map(_leaf, pair)) for pair in pairs), strict=True)))
        nodes: list[Any] = [t.grad_fn for pair in pairs for t in pair if t.grad_fn is not None]
        for node in nodes:
            node.metadata[self] = this  # the graph holds the pass, which must not hold the graph
        self._without_graph = None if nodes else this
        self._passes = [ref for ref in self._passes if ref() is not None] + [weakref.ref(this)] * bool(nodes)
        return this

    def _replay(self, node: Any, binding: Binding) -> Operands:
        """Return the operands that a layer had in the pass whose backward, now at ``node``, runs it again."""
        this = self._find_pass(node)
        reentrant = node.name() == "CheckpointFunctionBackward" and torch.is_grad_enabled()
        if reentrant and (this is None or binding in this.without_grad):
            # Its forward left no graph through which gradients could go: they go to the factors directly.
            if self.training and self.dropout > 0:
                raise RuntimeError(
                    "activation checkpointing with use_reentrant=True cannot repeat the factors' dropout; use "
                    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or set dropout=0"
                )
            this = None
        if this is None:  # the layer ran outside of a pass
            return self._composed([binding.site])[0]
        this.replayed = (torch._C._current_graph_task_id(), _sequence_number())
        return this.values[binding]

    def _find_pass(self, node: Any) -> _Pass | None:
        """Return the pass in which ``node`` was made: while the pass ran, or a part of it again (nested checkpoints).

        Autograd numbers its nodes in the order in which they are made.
        """
        number, task = node._sequence_nr(), torch._C._current_graph_task_id()
        living = [this for ref in self._passes if (this := ref()) is not None]
        living += [self._without_graph] if self._without_graph is not None else []
        for this in living:
            if this.first < number <= this.last:
                return this
        again = [this for this in living if this.replayed[0] == task and this.replayed[1] < number]
        return max(again, key=lambda this: this.replayed[1], default=None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_passes": [], "_without_graph": None, "_running": None, "_thread": None}


def compose_by_kind(
    sites: Sequence[Any],
    kind_of: Callable[[Any], Hashable],
    compose: Callable[[list[Any]], Sequence[Sequence[Tensor]]],
) -> list[Operands]:
    """Compose the operands of many sites, those of one kind together.

    Args:
        sites: the sites.
        kind_of: the kind of a site.
        compose: takes all sites of one kind, and returns for each operand one tensor per site (:func:`per_site`).

    Returns:
        The operands of each site, in the order of ``sites``.
    """
    kinds: dict[Hashable, list[int]] = {}
    for i, site in enumerate(sites):
        kinds.setdefault(kind_of(site), []).append(i)
    found: dict[int, Operands] = {}
    for members in kinds.values():
        operands = compose([sites[i] for i in members])
        found.update(zip(members, zip(*operands, strict=True), strict=True))
    return [found[i] for i in range(len(sites))]


def per_site(operand: Tensor, n: int, dim: int = 3) -> Sequence[Tensor]:
    """Return the part of an operand that belongs to each of n sites.

    Args:
        operand: of ``dim`` dimensions, the first of which counts the sites; or of fewer dimensions, or with one entry
            in the first: then all sites have the same.
        n: the number of sites.
        dim: the number of dimensions of the operand where sites have their own.
    """
    if operand.dim() < dim:
        return [operand] * n
    return operand.unbind(0) if len(operand) == n else [operand[0]] * n


def take(tensor: Tensor, dim: int, indices: Sequence[int]) -> Tensor:
    """Return the entries ``indices`` of dimension ``dim``: the tensor itself or a view where possible."""
    first, n = indices[0], len(indices)
    if list(indices) == list(range(first, first + n)):
        return tensor if n == tensor.shape[dim] else tensor.narrow(dim, first, n)
    return torch.stack([tensor.select(dim, i) for i in indices], dim)


class _Pass:
    """The values of all factors in one forward pass.

    Attributes:
        values: the operands of every binding, outside the graph.
        first, last: the numbers of the autograd nodes made before the pass and at its end.
        without_grad: the bindings that ran under ``no_grad`` in it.
        replayed: when a part of it last ran again: autograd's id of that backward pass, and the number of a node made
            then.
    """

    def __init__(self, values: dict[Binding, Operands]) -> None:
        self.values = values
        self.first = self.last = _sequence_number()
        self.without_grad: set[Binding] = set()
        self.replayed = (-1, -1)


@torch.enable_grad()
def _sequence_number() -> int:
    """Return the number of an autograd node made now."""
    node: Any = torch.zeros((), requires_grad=True).view(()).grad_fn
    return int(node._sequence_nr())


def _leaf(tensor: Tensor) -> Tensor:
    """Return the values outside the graph, requiring a gradient as before, so that a layer saves the same again."""
    return tensor.detach().requires_grad_(tensor.requires_grad)
