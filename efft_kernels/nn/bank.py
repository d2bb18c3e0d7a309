"""``FactorBank``: what all banks of factors have in common: the layers they serve and the passes these run in."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import _symbolic_trace

from efft_kernels._autocast import no_autocast

Operands = tuple[Tensor, ...]
"""What a layer multiplies by: (D, G), or more where the update of one site is a product of more."""

#: Whether torch.fx traces; the older name, where there is no other, warns of what it means in a newer torch.
_is_traced = getattr(_symbolic_trace, "is_fx_symbolic_tracing", None) or _symbolic_trace.is_fx_tracing


class Binding:
    """One layer's hold on a bank: its site and, between :meth:`FactorBank.prepare` and ``release``, its factors.

    A layer finds everything through an object of its own, not by an index into a list, so that torch.compile can
    reuse one graph for all blocks of a model.

    Attributes:
        used: whether the factors had an effect in the pass that runs, or in the last one.
        read: whether a module has ever read the weight itself, with the update, in place of calling the layer.
        dense: whether that has ever taken a dense copy of the weight.
    """

    def __init__(self, site: Any) -> None:
        self.site = site
        self.prepared: Operands | None = None
        self.used = self.read = self.dense = False
        self.merged = False  # whether the weight has the update, which a graph of torch.fx must not add again

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles are taken between passes: what belongs to a running one stays behind.
        return {**self.__dict__, "prepared": None}


class FactorBank(nn.Module, ABC):
    """Factors of many linear layers, owned once: any method whose update of a layer is ``ΔW = D G``.

    A subclass owns parameters, knows what its sites are (any value that tells a layer's part of the bank), and says in
    :meth:`features` and :meth:`compose` what linear layer a site fits and what its operands are. Frozen tensors that an
    adapter must carry are its persistent buffers.

    Layers do not own factors: they :meth:`bind` a site and ask for its :meth:`down_up` pair. Composing per layer is
    always right; :meth:`prepare` composes all bound sites at once for the forward pass that follows, until
    :meth:`release` (``efft.apply`` calls both by hooks on the model).
    """

    _lock = threading.Lock()  # of all banks: held for an instant, and copies and pickles have none of their own
    dropout: float = 0.0
    """Probability of zeroing an element of a factor in training; :meth:`compose` does it, if anything does."""

    def __init__(self) -> None:
        super().__init__()
        self.bindings: list[Binding] = []
        self._passes: list[weakref.ref[_Pass]] = []  # their graphs hold them
        self._without_graph: _Pass | None = None  # the last pass, if none of its factors needs a gradient
        self._running: _Pass | None = None  # between prepare and release, where gradients are wanted
        self._thread: int | None = None  # whose pass this is: another's composes layer by layer meanwhile

    @abstractmethod
    def features(self, site: Any) -> tuple[int, int]:
        """(in_features, out_features) of a linear layer that ``site`` fits."""

    @abstractmethod
    def compose(self, sites: Sequence[Any]) -> Sequence[Operands]:
        """(D [in_features, r], G [r, out_features]) of each site, differentiable in the factors, with the scale in one
        of them. Called with autocast off: the factors are tiny and their rounding would be the update's.

        The operands of a site that stands for many matrices may be others (:meth:`TTFactors.compose`).
        """

    def describe(self, site: Any) -> str:
        """The site in the words of this bank, for the ``repr`` of the layer that uses it."""
        return f"{type(self).__name__}, site={site}"

    def bind(self, site: Any) -> Binding:
        """Register a layer that uses ``site``; returns what to pass to :meth:`down_up`."""
        self.bindings.append(Binding(site))
        return self.bindings[-1]

    def down_up(self, binding: Binding) -> Operands:
        """(D [in_features, r], G [r, out_features]) of a bound site, or what else :meth:`compose` gives for it, with
        this pass's dropout if training."""
        prepared = binding.prepared  # read once: another thread may release it
        if prepared is not None and (torch.compiler.is_compiling() or self._thread == threading.get_ident()):
            if not torch.compiler.is_compiling():  # a side effect, which a compiled checkpoint refuses
                binding.used = True
                if self._running is not None and not torch.is_grad_enabled():
                    self._running.without_grad.add(binding)
            return prepared
        if not torch.compiler.is_compiling():
            if _is_traced():
                return self._traced(binding)
            node = torch._C._current_autograd_node()
            if node is not None:  # activation checkpointing runs the layer again, inside backward
                return self._replay(node, binding)
        return self._composed([binding.site])[0]

    def forward(self, which: Any) -> Any:
        """(D, G) of the ``which``-th binding, with dropout if training; G is zero while its layer is merged. Of a list
        of sites the operands, as :meth:`compose` gives them.

        The former is for graphs of torch.fx, of which the bank is a module that is called, the latter for what makes
        parameters whole while their module is called, and again in its backward (ZeRO-3): layers ask :meth:`down_up`.
        """
        if isinstance(which, list):
            # Parameters lose their content after the call, what is made from them does not.
            aliases = {id(p): p.view_as(p) for p in self.parameters()}
            return [tuple(aliases.get(id(t), t) for t in operands) for operands in self.compose(which)]
        binding = self.bindings[which]
        D, G = self._composed([binding.site])[0]
        return D, torch.zeros_like(G) if binding.merged else G

    def _traced(self, binding: Binding) -> tuple[Tensor, Tensor]:
        """A call of this bank in the graph that torch.fx traces, whose tracer takes modules of torch.nn for leaves."""
        self.__dict__["__module__"] = "torch.nn"
        try:
            pair = self(self.bindings.index(binding))
        finally:
            del self.__dict__["__module__"]
        return pair[0], pair[1]

    def evaluated(self, site: Any) -> tuple[Tensor, Tensor]:
        """(D, G) of a site from the factors as they are now, without dropout."""
        return self.evaluated_together([site])[0]

    def evaluated_together(self, sites: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
        """The same of several sites; what the method shares between them is one tensor."""
        training, self.training = self.training, False
        try:
            operands = self._composed(list(sites))
            with no_autocast(next(self.parameters()).device):
                return [self.pair(site, *factors) for site, factors in zip(sites, operands, strict=True)]
        finally:
            self.training = training

    def pair(self, site: Any, D: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        """(D, G) of a site from what :meth:`compose` gives for it."""
        (G,) = rest
        return D, G

    def prepare(self) -> None:
        """Compose all bound sites at once; :meth:`down_up` serves them to this thread until :meth:`release`."""
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
        # Inside torch.func there is no backward to run a layer again in.
        graph = torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()
        self._running = self._remember(pairs) if graph else None

    def release(self) -> list[Binding]:
        """End of the forward pass that :meth:`prepare` began. Returns the bindings that it did not use."""
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
        """Keep the values of a pass as long as its graph lives, for layers that run again inside its backward."""
        this = _Pass(dict(zip(self.bindings, (tuple(map(_leaf, pair)) for pair in pairs), strict=True)))
        nodes: list[Any] = [t.grad_fn for pair in pairs for t in pair if t.grad_fn is not None]
        for node in nodes:
            node.metadata[self] = this  # the pass must not hold the graph in turn
        self._without_graph = None if nodes else this
        self._passes = [ref for ref in self._passes if ref() is not None] + [weakref.ref(this)] * bool(nodes)
        return this

    def _replay(self, node: Any, binding: Binding) -> Operands:
        """The factors that a layer had in the pass whose backward, now at ``node``, runs it again."""
        this = self._find_pass(node)
        reentrant = node.name() == "CheckpointFunctionBackward" and torch.is_grad_enabled()
        if reentrant and (this is None or binding in this.without_grad):
            # Its forward left no graph to send gradients to: they go to the factors themselves.
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
        """The pass that ``node`` was made in: while it ran, or while a part of it was run again (nested checkpoints).

        Autograd numbers its nodes in the order they are made.
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
        first, last: numbers of the autograd nodes before the pass and at its end.
        without_grad: bindings that ran under ``no_grad`` in it.
        replayed: where a part of it was last run again: backward (autograd's id of it), number of a node then.
    """

    def __init__(self, values: dict[Binding, Operands]) -> None:
        self.values = values
        self.first = self.last = _sequence_number()
        self.without_grad: set[Binding] = set()
        self.replayed = (-1, -1)


@torch.enable_grad()
def _sequence_number() -> int:
    """The number of an autograd node made now."""
    node: Any = torch.zeros((), requires_grad=True).view(()).grad_fn
    return int(node._sequence_nr())


def _leaf(tensor: Tensor) -> Tensor:
    """The same values outside the graph, requiring a gradient as before, so that a layer saves the same again."""
    return tensor.detach().requires_grad_(tensor.requires_grad)
