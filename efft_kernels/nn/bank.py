"""Define ``FactorBank``, the base class of all modules that own factors shared by many layers, and helpers for it.

A bank owns the trainable tensors (the factors). A *site* is the part of a bank that one layer uses. The *operands* of
a site are the tensors by which its layer multiplies, in general D and G. A *pass* is one forward pass of the model,
from :meth:`FactorBank.prepare` to :meth:`FactorBank.release`.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import _symbolic_trace

from efft_kernels._arguments import no_autocast
from efft_kernels.nn.evaluation import Evaluated, can_be_kept, snapshot, surroundings

Operands = tuple[Tensor, ...]
"""The operands of a site: (D, G), or more tensors if the update of the site is a product of more factors."""

#: A function that returns whether torch.fx is tracing. Newer versions of torch warn if the older name is used.
_is_traced = getattr(_symbolic_trace, "is_fx_symbolic_tracing", None) or _symbolic_trace.is_fx_tracing


class Binding:
    """Connect one layer to its bank: hold the site and, during a pass, the operands.

    A layer reads its operands from this object instead of indexing a list, so that torch.compile can reuse one graph
    for all blocks of a model.

    Attributes:
        site: the part of the bank that the layer uses.
        prepared: the operands in the running pass; None between passes.
        used: whether the factors had an effect in the running pass, or in the last one if no pass is running.
        read: whether a module has ever read the weight with the update instead of calling the layer.
        dense: whether such a read has ever created a dense copy of the weight.
        merged: whether the update is merged into the weight, in which case a torch.fx graph must not add it again.
    """

    def __init__(self, site: Any) -> None:
        self.site = site
        self.prepared: Operands | None = None
        self.used = self.read = self.dense = False
        self.merged = False

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles are made between passes, so they exclude the state of a running pass.
        return {**self.__dict__, "prepared": None}


class FactorBank(nn.Module, ABC):
    """Own the factors of many layers, for any method whose update of a layer is ``ΔW = D G``.

    A subclass owns parameters and defines its sites. A site can be any value that identifies one layer's part of the
    bank. The subclass states in :meth:`sizes` which linear layer a site fits, and computes the operands of sites in
    :meth:`compose`. Frozen tensors that an adapter must save are persistent buffers of the bank.

    Layers do not own factors: a layer calls :meth:`bind` with a site and asks for its (D, G) with :meth:`down_up`.
    Between passes, each call of a layer composes its own operands. :meth:`prepare` composes the operands of all bound
    sites at once for the next forward pass, until :meth:`release` is called (``efft.apply`` registers hooks on the
    model that call both).
    """

    _lock = threading.Lock()  # shared by all banks, because a bank with its own lock could not be copied or pickled
    dropout: float = 0.0
    """Probability with which :meth:`compose` zeroes each element of a factor in training mode."""
    _evaluated: Evaluated | None = None  # the operands of the last evaluation

    def __init__(self) -> None:
        super().__init__()
        self.bindings: list[Binding] = []
        self._passes: list[weakref.ref[_Pass]] = []  # the autograd graphs own the passes
        self._without_graph: _Pass | None = None  # the last pass, if none of its factors needs a gradient
        self._running: _Pass | None = None  # the pass between prepare and release, if gradients are needed
        self._thread: int | None = (
            None  # the thread that runs the prepared pass; layers in other threads compose their own operands
        )

    @abstractmethod
    def sizes(self, site: Any) -> tuple[int, int]:
        """Return (in_features, out_features) of a linear layer that ``site`` fits."""

    @abstractmethod
    def compose(self, sites: Sequence[Any]) -> Sequence[Operands]:
        """Return (D [in_features, r], G [r, out_features]) of each site, differentiable with respect to the factors.

        One of the two contains the scale. Autocast is off during the call, because the factors are small and rounding
        them would round the update. A site that stands for many matrices may have other operands
        (:meth:`TTFactors.compose`).
        """

    def settings(self) -> Hashable | None:
        """Return all values other than tensors that affect the results of :meth:`compose` in eval mode.

        A class that defines this method composes its operands once in evaluation, and again only after a parameter, a
        buffer or one of these values has changed. A subclass does not inherit this behavior, because its operands may
        depend on more values. It composes the operands in every pass unless it defines this method itself.

        Returns:
            None, by default, to compose the operands in every pass.
        """
        return None

    def sources(self) -> list[Tensor]:
        """Return all tensors that affect the results of :meth:`compose` in eval mode."""
        return [*self.parameters(), *self.buffers()]

    def forget(self) -> None:
        """Free the operands of the last evaluation, so that the next evaluation composes them again.

        Call this method if factors on a GPU have changed without increasing their version: through ``.data``, by a
        replay of a CUDA graph, or by code that torch does not know. A change of the mode or of the device calls this
        method itself.
        """
        self._evaluated = None

    def train(self, mode: bool = True) -> FactorBank:
        self.forget()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FactorBank:
        self.forget()  # an unused copy would stay on the old device
        return super()._apply(fn, recurse)

    def describe(self, site: Any) -> str:
        """Describe the site in the terms of this bank, for the ``repr`` of the layer that uses the site."""
        return f"{type(self).__name__}, site={site}"

    def bind(self, site: Any) -> Binding:
        """Register a layer that uses ``site``, and return the binding that the layer passes to :meth:`down_up`."""
        self.bindings.append(Binding(site))
        return self.bindings[-1]

    def down_up(self, binding: Binding) -> Operands:
        """Return the operands of a bound site, in the form in which :meth:`compose` returns them.

        In general the operands are (D [in_features, r], G [r, out_features]). In training mode they include the
        dropout of the running pass.
        """
        prepared = binding.prepared  # read only once, because another thread may release the pass
        compiling = torch.compiler.is_compiling()
        if prepared is not None:
            if compiling:  # compiled checkpointing does not allow side effects
                return prepared
            if self._thread == threading.get_ident():
                binding.used = True
                if self._running is not None and not torch.is_grad_enabled():
                    self._running.without_grad.add(binding)
                return prepared
        if not compiling:
            if _is_traced():
                return self._traced(binding)
            node: Any = torch._C._current_autograd_node()
            if node is not None:  # activation checkpointing is running the layer again inside the backward pass
                return self._replay(node, binding)
            kept = self._evaluate(compose=len(self.bindings) == 1)
            if kept is not None and binding in kept:
                return kept[binding]
        return self._composed([binding.site])[0]

    def forward(self, which: Any) -> Any:
        """Return (D, G) of the binding number ``which``, or the operands of each site in the list ``which``.

        Layers call :meth:`down_up` instead. Graphs of torch.fx call the bank with a binding number. D and G then
        include the dropout of training mode, and G is zero while the layer is merged. The bank calls itself with a list
        of sites if it has forward pre-hooks, because libraries that shard parameters (ZeRO-3) gather the parameters in
        such hooks when the module is called and again in its backward pass.
        """
        if isinstance(which, list):
            # The parameters lose their content after the call, so operands that are parameters are returned as views.
            aliases = {id(p): p.view_as(p) for p in self.parameters()}
            return [tuple(aliases.get(id(t), t) for t in operands) for operands in self.compose(which)]
        binding = self.bindings[which]
        D, G = self._composed([binding.site])[0]
        return D, torch.zeros_like(G) if binding.merged else G

    def _traced(self, binding: Binding) -> tuple[Tensor, Tensor]:
        """Return a call of this bank for the graph that torch.fx is tracing; the bank stays one module in the graph."""
        self.__dict__["__module__"] = "torch.nn"
        try:
            pair = self(self.bindings.index(binding))
        finally:
            del self.__dict__["__module__"]
        return pair[0], pair[1]

    def evaluated(self, site: Any) -> tuple[Tensor, Tensor]:
        """Return (D, G) of a site, computed from the current factors without dropout."""
        return self.evaluated_together([site])[0]

    def evaluated_together(self, sites: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
        """Return (D, G) of several sites as :meth:`evaluated` does, composed together, so that sites can share D."""
        training, self.training = self.training, False
        try:
            operands = self._composed(list(sites))
            with no_autocast(next(self.parameters()).device):
                return [self.pair(site, *factors) for site, factors in zip(sites, operands, strict=True)]
        finally:
            self.training = training

    def pair(self, site: Any, D: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        """Return (D, G) of a site, computed from the operands that :meth:`compose` returns for the site."""
        (G,) = rest
        return D, G

    def prepare(self) -> None:
        """Start a pass: compose the operands of all bound sites at once.

        Until :meth:`release`, :meth:`down_up` returns these operands to the calling thread. If a pass of another thread
        is running, this method does nothing.
        """
        if not torch.compiler.is_compiling():
            with self._lock:
                if self._thread not in (None, threading.get_ident()):
                    return
                self._thread = threading.get_ident()
        kept = None if torch.compiler.is_compiling() else self._evaluate()
        pairs: Sequence[Operands]
        if kept is not None:
            pairs = [kept[binding] for binding in self.bindings]
        else:
            pairs = self._composed([binding.site for binding in self.bindings])
        for binding, pair in zip(self.bindings, pairs, strict=True):
            binding.prepared = pair
        if torch.compiler.is_compiling():
            return
        for binding in self.bindings:
            binding.used = False
        # Inside torch.func, layers never run again in a backward pass.
        graph = torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()
        self._running = self._remember(pairs) if graph else None

    def release(self) -> list[Binding]:
        """End the pass that :meth:`prepare` started in this thread, and return the bindings that the pass did not use.

        Return an empty list in compiled code, or if no pass of this thread is running.
        """
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

    def _evaluate(self, compose: bool = True) -> Mapping[Binding, Operands] | None:
        """Return the operands of all bindings for an evaluation, from the last evaluation if they are still current.

        Return None if the operands must be composed in every pass. With ``compose=False``, return None also if they
        would have to be composed now.
        """
        if self.training or "settings" not in type(self).__dict__ or self._forward_pre_hooks:
            return None
        tensors = self.sources()
        if not can_be_kept(tensors):
            if torch.is_grad_enabled():  # an optimizer step may follow and change the factors
                self._evaluated = None
            return None
        settings = (self.settings(), surroundings(tensors), tuple(self.bindings))
        kept = self._evaluated
        if kept is not None and kept.is_current(tensors, settings):
            return kept.operands
        if not compose:
            return None
        # Tensors made in inference mode could not be used outside of it.
        with torch.inference_mode(False), torch.no_grad():
            sources = snapshot(tensors)
            composed = self._composed([binding.site for binding in self.bindings])
            operands = dict(zip(self.bindings, composed, strict=True))
        self._evaluated = Evaluated(operands, sources, settings)
        return operands

    def _composed(self, sites: list[Any]) -> Sequence[Operands]:
        if not torch.compiler.is_compiling() and any(hasattr(p, "full_tensor") for p in self.parameters()):
            raise RuntimeError(
                f"the factors of this {type(self).__name__} are sharded (DTensor). fully_shard gathers them only while "
                "the module that contains them runs: shard the whole adapted model instead of the factors alone, and "
                "call the whole model; to merge or export, save the adapter and load it into a plain model"
            )
        with no_autocast(next(self.parameters()).device):
            if self._forward_pre_hooks and not torch.compiler.is_compiling():
                return self(sites)
            return self.compose(sites)

    def _remember(self, pairs: Sequence[Operands]) -> _Pass:
        """Keep the operands of a pass as long as its autograd graph exists.

        Activation checkpointing runs layers again in the backward pass, and the layers then need these operands.
        """
        this = _Pass(self.bindings, pairs)
        nodes: list[Any] = [t.grad_fn for pair in pairs for t in pair if t.grad_fn is not None]
        for node in nodes:
            node.metadata[self] = this  # the graph owns the pass, so the pass must not own the graph
        self._without_graph = None if nodes else this
        self._passes = [ref for ref in self._passes if ref() is not None] + [weakref.ref(this)] * bool(nodes)
        return this

    def _replay(self, node: Any, binding: Binding) -> Operands:
        """Return the operands for a layer that the backward pass, now at ``node``, runs again.

        The operands are those of the forward pass to which this backward pass belongs.
        """
        this = self._find_pass(node)
        reentrant = node.name() == "CheckpointFunctionBackward" and torch.is_grad_enabled()
        if reentrant and (this is None or binding in this.without_grad):
            # The forward pass of the layer left no graph, so gradients must flow directly to the factors.
            if self.training and self.dropout > 0:
                raise RuntimeError(
                    "activation checkpointing with use_reentrant=True cannot repeat the factors' dropout; use "
                    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or set dropout=0"
                )
            this = None
        if this is None:  # the layer ran between passes
            return self._composed([binding.site])[0]
        this.replayed = (torch._C._current_graph_task_id(), _sequence_number())
        return this.operands(binding)

    def _find_pass(self, node: Any) -> _Pass | None:
        """Return the pass in which ``node`` was created.

        The node was created either while the pass ran, or while a part of the pass ran again (nested checkpoints).
        Autograd numbers its nodes in the order of their creation, so the number of ``node`` identifies the pass.
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
        of_a_pass: dict[str, Any] = {"_passes": [], "_without_graph": None, "_running": None, "_thread": None}
        return {**self.__dict__, **of_a_pass, "_evaluated": None}


def compose_by_kind(
    sites: Sequence[Any],
    kind_of: Callable[[Any], Hashable],
    compose: Callable[[list[Any]], Sequence[Sequence[Tensor]]],
) -> list[Operands]:
    """Compose the operands of many sites, one call of ``compose`` for each kind of site.

    Args:
        sites: the sites.
        kind_of: returns the kind of a site.
        compose: accepts all sites of one kind. For each operand, it returns a sequence with one tensor per site
            (:func:`per_site`).

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
    """Split an operand into one part for each of n sites.

    Args:
        operand: a tensor whose first dimension indexes the sites if it has ``dim`` dimensions. If it has fewer
            dimensions, or only one entry in the first dimension, all sites share it.
        n: the number of sites.
        dim: the number of dimensions of an operand that differs between the sites.
    """
    if operand.dim() < dim:
        return [operand] * n
    return operand.unbind(0) if len(operand) == n else [operand[0]] * n


def take(tensor: Tensor, dim: int, indices: Sequence[int]) -> Tensor:
    """Return the entries ``indices`` of dimension ``dim``: if possible the tensor itself or a view, else a copy."""
    first, n = indices[0], len(indices)
    if list(indices) == list(range(first, first + n)):
        return tensor if n == tensor.shape[dim] else tensor.narrow(dim, first, n)
    return torch.stack([tensor.select(dim, i) for i in indices], dim)


class _Pass:
    """Remember the operands of all sites in one forward pass, without keeping the graph that computed them.

    Attributes:
        first, last: the numbers of the autograd nodes created just before the pass and at its end.
        without_grad: the bindings that ran under ``no_grad`` in the pass.
        replayed: describes the last time that a part of the pass ran again. The first entry is autograd's id of that
            backward pass; the second is the number of a node created at that time.
    """

    def __init__(self, bindings: Sequence[Binding], pairs: Sequence[Operands]) -> None:
        owners: dict[int, Tensor] = {}
        self._places = {b: [_place(t, owners) for t in pair] for b, pair in zip(bindings, pairs, strict=True)}
        self.first = self.last = _sequence_number()
        self.without_grad: set[Binding] = set()
        self.replayed = (-1, -1)

    def operands(self, binding: Binding) -> Operands:
        """Return the operands of a binding as tensors without a graph.

        They require a gradient if the operands of the pass did, so that a layer saves the same tensors again.
        """
        return tuple(
            owner.as_strided(*place).detach().requires_grad_(required) if place else owner.requires_grad_(required)
            for owner, place, required in self._places[binding]
        )


#: Three values that describe an operand: a tensor without a graph; the sizes, strides and offset of the view of this
#: tensor that is the operand (empty if the tensor itself is the operand); and whether the operand requires a gradient.
_Place = tuple[Tensor, tuple[Any, ...], bool]


def _place(tensor: Tensor, owners: dict[int, Tensor]) -> _Place:
    """Describe a tensor as a view of the tensor that owns its memory. ``owners`` collects the detached owners.

    Most operands are views of few owners. Detaching only the owners saves several calls of the dispatcher per layer.
    """
    if type(tensor) not in (Tensor, nn.Parameter):
        return tensor.detach(), (), tensor.requires_grad
    base = tensor if tensor._base is None else tensor._base
    owner = owners.get(id(base))
    if owner is None:
        owner = owners[id(base)] = base.detach()
    view = () if base is tensor else (tensor.shape, tensor.stride(), tensor.storage_offset())
    return owner, view, tensor.requires_grad


@torch.enable_grad()
def _sequence_number() -> int:
    """Create an autograd node and return its sequence number."""
    node: Any = torch.zeros((), requires_grad=True).view(()).grad_fn
    return int(node._sequence_nr())
