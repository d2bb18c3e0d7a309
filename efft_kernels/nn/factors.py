"""``TTFactors``: one tensor train U · C · V shared by many linear layers, owned once."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from efft_kernels.nn.initialization import initialize
from efft_kernels.ops import tt_contract


@dataclass(frozen=True)
class Site:
    """Which part of a train one linear layer uses.

    Attributes:
        layer: index into the cores' first dimension (ignored where cores are shared by all layers).
        cores: the layer's cores, one per column block of its output: ``(0, 1, 2)`` for a fused qkv.
        transpose: use the transposed train, ``D = Vᵀ`` and ``G = s Cᵀ Uᵀ`` (fc2 beside fc1).
        columns: half-open range of V's columns this layer uses; None for all.
        mask_scope: sites of one layer with the same scope share one draw of the dropout masks of U and V.
    """

    layer: int = 0
    cores: tuple[int, ...] = (0,)
    transpose: bool = False
    columns: tuple[int, int] | None = None
    mask_scope: int = 0


class Masks(NamedTuple):
    """Dropout masks of one forward pass, True where an element is kept; the first dimension counts layers."""

    U: Tensor  # [n_layers, n_scopes, d_in, r1]
    C: Tensor  # [n_layers, n_cores, r1, r2]
    V: Tensor  # [n_layers, n_scopes, r2, d_out]


class Binding:
    """One layer's hold on a bank: its site and, between :meth:`TTFactors.prepare` and ``release``, its factors.

    A layer finds everything through an object of its own, not by an index into a list, so that torch.compile can
    reuse one graph for all blocks of a model.
    """

    def __init__(self, site: Site) -> None:
        self.site = site
        self.prepared: tuple[Tensor, Tensor] | None = None
        self.used = False  # in the pass that runs, or in the last one

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles are taken between passes: what belongs to a running one stays behind.
        return {**self.__dict__, "prepared": None}


class TTFactors(nn.Module):
    """The factors of ``ΔW = s · U C V``: U and V shared by all layers, one small core per matrix.

    Layers do not own factors: they :meth:`bind` a :class:`Site` and ask for its :meth:`down_up` pair. Contracting per
    layer is always right; :meth:`prepare` contracts all bound sites at once for the forward pass that follows, until
    :meth:`release` (``efft.apply`` calls both by hooks on the model).

    Args:
        d_in, d_out: sizes of the two outer sides, ``U [d_in, r1]`` and ``V [r2, d_out]``.
        rank: ``r`` or ``(r1, r2)``.
        n_layers: layers that have cores of their own.
        n_cores: cores of each layer.
        core_sharing: ``"per_layer"`` (cores ``[n_layers, n_cores, r1, r2]``) or ``"shared"`` (``[1, n_cores, r1, r2]``
            serve every layer, as in the paper's public code).
        scale: s, a plain multiplier.
        trainable_scale: make s a parameter that starts at ``scale``.
        dropout: probability of zeroing an element of U, C and V in training (never of an activation); kept elements are
            rescaled by 1/(1-p).
        init: ``"v"`` or ``"u"``: the side that starts at zero.
        core_init: see :mod:`efft_kernels.nn.initialization`.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int | tuple[int, int],
        *,
        n_layers: int = 1,
        n_cores: int = 1,
        core_sharing: str = "per_layer",
        scale: float = 1.0,
        trainable_scale: bool = False,
        dropout: float = 0.0,
        init: str = "v",
        core_init: str = "last",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        r1, r2 = (rank, rank) if isinstance(rank, int) else rank
        sizes = {"d_in": d_in, "d_out": d_out, "r1": r1, "r2": r2, "n_layers": n_layers, "n_cores": n_cores}
        wrong = {name: size for name, size in sizes.items() if size < 1}
        if wrong:
            raise ValueError(f"TTFactors: sizes and ranks must be at least 1, got {wrong}")
        if core_sharing not in ("per_layer", "shared"):
            raise ValueError(f"core_sharing must be 'per_layer' or 'shared', got {core_sharing!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.d_in, self.d_out, self.r1, self.r2 = d_in, d_out, r1, r2
        self.n_layers, self.n_cores, self.core_sharing = n_layers, n_cores, core_sharing
        self.dropout, self.init, self.core_init = dropout, init, core_init
        kw: dict[str, Any] = {"device": device, "dtype": dtype}
        self.U = nn.Parameter(torch.empty(d_in, r1, **kw))
        owners = n_layers if core_sharing == "per_layer" else 1
        self.C = nn.Parameter(torch.empty(owners, n_cores, r1, r2, **kw))
        self.V = nn.Parameter(torch.empty(r2, d_out, **kw))
        self.scale: float | nn.Parameter = scale
        if trainable_scale:
            self.scale = nn.Parameter(torch.full((), scale, **kw))
        self.bindings: list[Binding] = []
        self._passes: list[weakref.ref[_Pass]] = []  # their graphs hold them
        self._without_graph: _Pass | None = None  # the last pass, if none of its factors needs a gradient
        self._running: _Pass | None = None  # between prepare and release, where gradients are wanted
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw U, C and V anew (see :func:`efft_kernels.nn.initialization.initialize`)."""
        initialize(self.U, self.C, self.V, self.init, self.core_init)

    @property
    def scale_value(self) -> float:
        """s as a number, whether it is trained or not."""
        return self.scale.item() if isinstance(self.scale, Tensor) else self.scale

    def bind(self, site: Site) -> Binding:
        """Register a layer that uses ``site``; returns what to pass to :meth:`down_up`.

        Raises:
            ValueError: the site lies outside this bank.
        """
        if not (0 <= site.layer < self.n_layers and all(0 <= c < self.n_cores for c in site.cores)):
            raise ValueError(f"{site} does not fit a bank of {self.n_layers} layers with {self.n_cores} cores each")
        first, last = site.columns or (0, self.d_out)
        if not 0 <= first < last <= self.d_out or not site.cores:
            raise ValueError(f"{site} does not fit a train with {self.d_out} output columns")
        if site.transpose and len(site.cores) > 1:
            raise ValueError(f"{site}: a transposed train has one core, its output is U's one block of rows")
        if site.mask_scope < 0:
            raise ValueError(f"{site}: mask_scope must be 0 or more")
        self.bindings.append(Binding(site))
        return self.bindings[-1]

    def features(self, site: Site) -> tuple[int, int]:
        """(in_features, out_features) of a linear layer that ``site`` fits."""
        first, last = site.columns or (0, self.d_out)
        if site.transpose:
            return last - first, self.d_in
        return self.d_in, (last - first) * len(site.cores)

    def down_up(self, binding: Binding) -> tuple[Tensor, Tensor]:
        """(D [in_features, r], G [r, out_features]) of a bound site, with this pass's dropout if training."""
        prepared = binding.prepared  # read once: another thread may release it
        if prepared is not None:
            if not torch.compiler.is_compiling():  # a side effect, which a compiled checkpoint refuses
                binding.used = True
                if self._running is not None and not torch.is_grad_enabled():
                    self._running.without_grad.add(binding)
            return prepared
        if not torch.compiler.is_compiling():
            node = torch._C._current_autograd_node()
            if node is not None:  # activation checkpointing runs the layer again, inside backward
                return self._replay(node, binding)
        return self._contract([binding.site])[0][0]

    def evaluated(self, site: Site) -> tuple[Tensor, Tensor]:
        """(D, G) of a site from the factors as they are now, without dropout."""
        training, self.training = self.training, False
        try:
            return self._contract([site])[0][0]
        finally:
            self.training = training

    def prepare(self) -> None:
        """Contract all bound sites in one launch per kind of site; :meth:`down_up` serves them until
        :meth:`release`."""
        pairs, stacked = self._contract([binding.site for binding in self.bindings])
        for binding, pair in zip(self.bindings, pairs, strict=True):
            binding.prepared = pair
        if torch.compiler.is_compiling():
            return
        for binding in self.bindings:
            binding.used = False
        self._running = self._remember(pairs, stacked) if torch.is_grad_enabled() else None

    def release(self) -> list[Binding]:
        """End of the forward pass that :meth:`prepare` began. Returns the bindings that it did not use."""
        for binding in self.bindings:
            binding.prepared = None
        if torch.compiler.is_compiling():
            return []
        if self._running is not None:
            self._running.last, self._running = _sequence_number(), None
        return [binding for binding in self.bindings if not binding.used]

    def draw_masks(self, n_layers: int) -> Masks | None:
        """Fresh dropout masks for ``n_layers`` layers; None where nothing is dropped (p = 0 or eval mode)."""
        if not self.training or self.dropout == 0:
            return None
        n_scopes = 1 + max([0, *[binding.site.mask_scope for binding in self.bindings]])  # default=: not traced by 2.13
        shapes = (
            (n_layers, n_scopes, *self.U.shape),
            (n_layers, *self.C.shape[1:]),
            (n_layers, n_scopes, *self.V.shape),
        )
        return Masks(*(torch.rand(shape, device=self.U.device) >= self.dropout for shape in shapes))

    def _remember(self, pairs: list[tuple[Tensor, Tensor]], stacked: list[Tensor]) -> _Pass:
        """Keep the values of a pass as long as its graph lives, for layers that run again inside its backward."""
        this = _Pass(dict(zip(self.bindings, ((_leaf(D), _leaf(G)) for D, G in pairs), strict=True)))
        nodes: list[Any] = [t.grad_fn for t in stacked if t.grad_fn is not None]
        for node in nodes:
            node.metadata[self] = this  # the pass must not hold the graph in turn
        self._without_graph = None if nodes else this
        self._passes = [ref for ref in self._passes if ref() is not None] + [weakref.ref(this)] * bool(nodes)
        return this

    def _replay(self, node: Any, binding: Binding) -> tuple[Tensor, Tensor]:
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
            return self._contract([binding.site])[0][0]
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

    def _contract(self, sites: list[Site]) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
        """(D, G) of each site, and the stacked tensors they are slices of."""
        layers = sorted({site.layer for site in sites})
        masks = self.draw_masks(len(layers))
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for i, site in enumerate(sites):
            kinds.setdefault((site.cores, site.transpose, site.columns, site.mask_scope), []).append(i)
        pairs: dict[int, tuple[Tensor, Tensor]] = {}
        stacked = []
        for members in kinds.values():
            D, G = self._contract_kind(
                sites[members[0]], [layers.index(sites[i].layer) for i in members], layers, masks
            )
            stacked += [G] if D is self.U else [D, G]
            ups = G.unbind(0) if len(G) == len(members) else [G[0]] * len(members)
            downs = D.unbind(0) if D.dim() == 3 else [D] * len(members)
            pairs.update(zip(members, zip(downs, ups, strict=True), strict=True))
        return [pairs[i] for i in range(len(sites))], stacked

    def _contract_kind(
        self, site: Site, rows: list[int], layers: list[int], masks: Masks | None
    ) -> tuple[Tensor, Tensor]:
        """D [in, r] (or [len(rows), in, r] under dropout) and G [len(rows), r, out] of sites alike but for the layer.

        ``rows`` index into ``layers`` and the masks. With shared cores and no dropout all layers are one row.
        """
        keep = 1.0 - self.dropout
        first, last = site.columns or (0, self.d_out)
        V = self.V[:, first:last] if site.columns else self.V
        C = _take(self.C, 1, list(site.cores))
        if self.core_sharing == "per_layer":
            C = _take(C, 0, [layers[row] for row in rows])
        if masks is None:
            if site.transpose:
                return V.t(), tt_contract(C.transpose(-1, -2), self.U.t(), scale=self.scale)
            return self.U, tt_contract(C, V, scale=self.scale)
        keep_U = _take(masks.U[:, site.mask_scope], 0, rows)
        keep_C = _take(_take(masks.C, 1, list(site.cores)), 0, rows)
        keep_V = _take(masks.V[:, site.mask_scope, :, first:last], 0, rows)
        C = C.expand_as(keep_C)
        scale = self.scale / keep**2
        if site.transpose:
            G = tt_contract(
                C.transpose(-1, -2),
                self.U.t(),
                scale=scale,
                keep_C=keep_C.transpose(-1, -2),
                keep_V=keep_U.transpose(-1, -2),
            )
            return (V * keep_V).transpose(-1, -2) / keep, G
        return self.U * keep_U / keep, tt_contract(C, V, scale=scale, keep_C=keep_C, keep_V=keep_V)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_passes": [], "_without_graph": None, "_running": None}

    def extra_repr(self) -> str:
        return (
            f"d_in={self.d_in}, d_out={self.d_out}, rank=({self.r1}, {self.r2}), n_layers={self.n_layers}, "
            f"n_cores={self.n_cores}, core_sharing={self.core_sharing!r}, scale={self.scale_value:g}, "
            f"dropout={self.dropout}"
        )


class _Pass:
    """The values of all factors in one forward pass.

    Attributes:
        values: (D, G) of every binding, outside the graph.
        first, last: numbers of the autograd nodes before the pass and at its end.
        without_grad: bindings that ran under ``no_grad`` in it.
        replayed: where a part of it was last run again: backward (autograd's id of it), number of a node then.
    """

    def __init__(self, values: dict[Binding, tuple[Tensor, Tensor]]) -> None:
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


def _take(tensor: Tensor, dim: int, indices: list[int]) -> Tensor:
    """Rows ``indices`` of dimension ``dim``: the tensor itself or a view where possible."""
    first, n = indices[0], len(indices)
    if indices == list(range(first, first + n)):
        return tensor if n == tensor.shape[dim] else tensor.narrow(dim, first, n)
    return torch.stack([tensor.select(dim, i) for i in indices], dim)
