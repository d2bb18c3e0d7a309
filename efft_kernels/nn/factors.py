"""Define ``TTFactors``, a bank that owns one tensor train U · C · V for many linear layers.

A *bank* is the module that owns the trained factors of many layers. A *site* is the part of the tensor train that one
layer uses (:class:`Site`). Sites are of one *kind* if they differ only in the index of their layer and have diagonals
(see :class:`TTFactors`) on the same sides. To *contract* a site means to multiply its cores by V, or by U if the site
is transposed. One launch contracts all sites of a kind.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from efft_kernels import _packed
from efft_kernels.nn.bank import Binding, FactorBank, Operands, per_site, take
from efft_kernels.nn.initialization import initialize
from efft_kernels.ops import tt_contract


@dataclass(frozen=True)
class Site:
    """Identify the part of a tensor train that is used by one linear layer, or by one parameter with many experts.

    Attributes:
        layer: index of the layer. It selects the cores (unless all layers share them), the dropout masks, the diagonals
            and, if ``trainable_scale`` is ``"matrix"``, the scales.
        cores: the layer's cores, one per column block of its output: ``(0, 1, 2)`` for a fused qkv.
        transpose: whether to use the transposed tensor train, ``D = Vᵀ`` and ``G = s Cᵀ Uᵀ``. The second layer of an
            MLP uses it if the first layer uses the train that is not transposed.
        columns: half-open range of V's columns that this layer uses; None for all.
        mask_scope: number of a draw of the dropout masks. Sites of one layer share one random draw of the masks of U
            and V if their scopes are equal.
        experts: number of experts whose matrices the site stands for; 0 for one plain matrix. All experts of a site
            share U and V. ``cores`` lists the cores of the first expert, then the cores of the second, and so on.
        interleaved: whether the output columns of an expert's column blocks alternate, ``[first of block 0, first of
            block 1, ..., second of block 0, ...]``, as the gates and values of some models do. Otherwise the columns
            of each block are contiguous.
    """

    layer: int = 0
    cores: tuple[int, ...] = (0,)
    transpose: bool = False
    columns: tuple[int, int] | None = None
    mask_scope: int = 0
    experts: int = 0
    interleaved: bool = False

    @property
    def blocks(self) -> int:
        """The number of column blocks of one matrix."""
        return len(self.cores) // (self.experts or 1)


def _part(site: Site) -> tuple[Any, ...]:
    """Return a key that identifies the part of the train that a site uses; its first entry is the layer."""
    return site.layer, site.cores, site.transpose, site.columns, site.mask_scope


class Masks(NamedTuple):
    """Hold the dropout masks of one forward pass. True keeps an element, and the first dimension indexes layers.

    n_scopes is the largest ``mask_scope`` of the bound sites, plus 1.
    """

    U: Tensor  # [n_layers, n_scopes, d_in, r1]
    C: Tensor  # [n_layers, n_cores, r1, r2]
    V: Tensor  # [n_layers, n_scopes, r2, d_out]


class _Kind(NamedTuple):
    """Hold sites that are composed together, because they differ only in the layer.

    Attributes:
        sites: the sites.
        rows: index of the layer of each site in the list of all layers that are composed.
        members: index of each site in the list of all sites that are composed.
    """

    sites: list[Site]
    rows: list[int]
    members: list[int]


class TTFactors(FactorBank):
    """Own the factors of ``ΔW = s · U C V``: all layers share U and V, and each matrix has one small core.

    Layers :meth:`bind` a :class:`Site` of this :class:`FactorBank`. One launch contracts all sites of a kind.

    A site can also have its own diagonals: ``ΔW = s · diag(a) U C V diag(b)``. The vector a is a row of the parameter
    ``a [rows, d_in]``, and each column block has its own vector b, a row of ``b [rows, d_out]``. Both parameters are
    initialized to one. D and G include the diagonals, so the diagonals add no cost per token. However, sites with
    different vectors a do not share one D.

    Args:
        d_in, d_out: sizes of the two outer dimensions, ``U [d_in, r1]`` and ``V [r2, d_out]``.
        rank: ``r`` or ``(r1, r2)``.
        n_layers: number of layers that have their own cores.
        n_cores: number of cores of each layer.
        core_sharing: ``"per_layer"`` for cores ``[n_layers, n_cores, r1, r2]``, or ``"shared"`` for cores
            ``[1, n_cores, r1, r2]`` that all layers use, as in the public code of the EFFT paper.
        scale: s, a plain multiplier.
        trainable_scale: whether to train the scale: False, True for one scale, or ``"matrix"`` for one scale per core
            and layer (even if layers share their cores). The trained scale is ``scale · exp(log_scale)``, and
            ``log_scale`` starts at zero. Useful scales are between 0.01 and 100. In this form, an optimizer step
            changes every scale by a similar ratio, no scale becomes zero (which would stop all training), and weight
            decay pulls the scale toward ``scale``.
        dropout: probability of zeroing an element of U, C and V in training mode (activations are never dropped). The
            other elements are multiplied by 1/(1-p).
        init: the factor that starts at zero, ``"v"`` or ``"u"``.
        core_init: the initialization of the cores (see :mod:`efft_kernels.nn.initialization`).
        scaled_inputs: sites that have a diagonal on their input side. This is a row of ``a``, or a row of ``b`` if the
            site uses the transposed tensor train.
        scaled_outputs: sites that have diagonals on their output side.
    """

    leader: TTFactors | None = None
    """See :meth:`follow_scale`."""
    _last_kinds: tuple[list[Site], list[int], list[_Kind]] | None = None

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
        trainable_scale: bool | Literal["matrix"] = False,
        dropout: float = 0.0,
        init: str = "v",
        core_init: str = "last",
        scaled_inputs: Sequence[Site] = (),
        scaled_outputs: Sequence[Site] = (),
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
        if trainable_scale not in (False, True, "matrix"):
            raise ValueError(f"trainable_scale must be False, True or 'matrix', got {trainable_scale!r}")
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
        self.initial_scale = scale
        self.log_scale: nn.Parameter | None = None
        if trainable_scale:
            sizes_of_scale = (n_layers, n_cores) if trainable_scale == "matrix" else (1, 1)
            self.log_scale = nn.Parameter(torch.empty(sizes_of_scale, **kw))
        self._rows_of_a, self._rows_of_b = self._rows_of_diagonals(scaled_inputs, scaled_outputs)
        self.a: nn.Parameter | None = None
        self.b: nn.Parameter | None = None
        if self._rows_of_a:
            self.a = nn.Parameter(torch.empty(sum(map(len, self._rows_of_a.values())), d_in, **kw))
        if self._rows_of_b:
            self.b = nn.Parameter(torch.empty(sum(map(len, self._rows_of_b.values())), d_out, **kw))
        self.reset_parameters()

    def _rows_of_diagonals(
        self, inputs: Sequence[Site], outputs: Sequence[Site]
    ) -> tuple[dict[Hashable, list[int]], dict[Hashable, list[int]]]:
        """Return two dictionaries from the key :func:`_part` of a site to its rows of ``a`` and to its rows of ``b``.

        The rows of all sites of one kind are adjacent, so that selecting these rows returns a view and not a copy.
        """
        counts: tuple[dict[Site, int], dict[Site, int]] = {}, {}
        for sites, is_output in ((inputs, False), (outputs, True)):
            for site in sites:
                self._check(site)
                if site.experts:
                    raise ValueError(f"{site}: experts share U and V, so a site of experts cannot have diagonals")
                counts[is_output != site.transpose][site] = site.blocks if is_output and not site.transpose else 1
        rows_of_a: dict[Hashable, list[int]] = {}
        rows_of_b: dict[Hashable, list[int]] = {}
        for count, rows in zip(counts, (rows_of_a, rows_of_b), strict=True):
            kinds = list(dict.fromkeys(_part(site)[1:] for site in count))
            end = 0
            for site in sorted(count, key=lambda site: kinds.index(_part(site)[1:])):
                rows[_part(site)] = list(range(end, end + count[site]))
                end += count[site]
        return rows_of_a, rows_of_b

    def reset_parameters(self) -> None:
        """Initialize U, C and V (:func:`efft_kernels.nn.initialization.initialize`), the scales and the diagonals."""
        initialize(self.U, self.C, self.V, self.init, self.core_init)
        if self.log_scale is not None:
            nn.init.zeros_(self.log_scale)
        for diagonals in (self.a, self.b):
            if diagonals is not None:
                nn.init.ones_(diagonals)

    @torch.no_grad()
    def replace(self, U: Tensor, C: Tensor, V: Tensor) -> None:
        """Replace the factors by new parameters, which may have other ranks. Optimizers must then be created again.

        Args:
            U: ``[d_in, r1]``.
            C: ``[n_layers, n_cores, r1, r2]``, or with a first dimension of 1 for shared cores.
            V: ``[r2, d_out]``. All three arguments are copied to the dtype and device of the old factors.

        Raises:
            ValueError: the shapes do not match each other or this bank.
        """
        r1, r2 = C.shape[-2:]
        expected = (self.d_in, r1), (*self.C.shape[:2], r1, r2), (r2, self.d_out)
        got = tuple(tuple(factor.shape) for factor in (U, C, V))
        if got != expected:
            raise ValueError(f"TTFactors.replace: expected U, C, V of shapes {expected}, got {got}")
        for name, factor in (("U", U), ("C", C), ("V", V)):
            old = getattr(self, name)
            new = factor.detach().to(old.device, old.dtype, copy=True, memory_format=torch.contiguous_format)
            setattr(self, name, nn.Parameter(new, requires_grad=old.requires_grad))
        self.r1, self.r2 = r1, r2

    def follow_scale(self, leader: TTFactors) -> None:
        """Use the ``log_scale`` of the bank ``leader`` instead of this bank's own. ``leader`` owns the parameter."""
        self.__dict__["leader"] = leader  # not registered as a submodule, so that each parameter has only one owner

    def _log_scale(self) -> Tensor | None:  # [1, 1] or [n_layers, n_cores]
        return (self if self.leader is None else self.leader).log_scale

    @property
    def scale(self) -> float | Tensor:
        """The scale s: a number or, if it is trained, a tensor [1, 1] or [n_layers, n_cores]."""
        log_scale = self._log_scale()
        return self.initial_scale if log_scale is None else self.initial_scale * log_scale.exp()

    @property
    def scale_value(self) -> float:
        """The scale s as a number, trained or not; the geometric mean if there are several scales."""
        log_scale = self._log_scale()
        return self.initial_scale if log_scale is None else self.initial_scale * log_scale.mean().exp().item()

    def settings(self) -> Hashable:
        """Return the fixed part of the scale, the only value besides tensors that can change the results."""
        return self.initial_scale

    def sources(self) -> list[Tensor]:
        """Return the factors, the diagonals and the trained scale, which another bank may own.

        These are the tensors that :meth:`compose` reads, whether or not they are registered as parameters.
        """
        tensors = (self.U, self.C, self.V, self.a, self.b, self._log_scale())
        return [tensor for tensor in tensors if tensor is not None]

    def bind(self, site: Site) -> Binding:
        """Register a layer that uses ``site``, and return the binding that the layer passes to :meth:`down_up`.

        Raises:
            ValueError: the site is outside this bank.
        """
        self._check(site)
        return super().bind(site)

    def _check(self, site: Site) -> None:
        """Raise ValueError if the site is outside this bank or is inconsistent."""
        if not (0 <= site.layer < self.n_layers and all(0 <= c < self.n_cores for c in site.cores)):
            raise ValueError(f"{site} does not fit a bank of {self.n_layers} layers with {self.n_cores} cores each")
        if not site.cores:
            raise ValueError(f"{site} has no cores: expected one per column block of the layer's output")
        first, last = site.columns or (0, self.d_out)
        if not 0 <= first < last <= self.d_out:
            raise ValueError(f"{site} does not fit a tensor train with {self.d_out} output columns")
        if site.experts < 0 or len(site.cores) % (site.experts or 1):
            raise ValueError(f"{site}: every expert needs the same number of cores, got {len(site.cores)} cores")
        if site.interleaved and not site.experts:
            raise ValueError(f"{site}: only the column blocks of experts can be interleaved")
        if site.transpose and site.blocks > 1:
            raise ValueError(
                f"{site}: a transposed tensor train has one core per matrix, because the rows of U "
                "form a single column block"
            )
        if site.mask_scope < 0:
            raise ValueError(f"{site}: mask_scope must be 0 or more")

    def sizes(self, site: Site) -> tuple[int, int]:
        """Return (in_features, out_features) of a linear layer that fits ``site``, or of each expert of the site."""
        first, last = site.columns or (0, self.d_out)
        if site.transpose:
            return last - first, self.d_in
        return self.d_in, (last - first) * site.blocks

    def describe(self, site: Site) -> str:
        """Describe the site's part of this tensor train."""
        cores = f"cores={site.cores}" if not site.experts else f"experts={site.experts}, cores per expert={site.blocks}"
        parts = [f"rank=({self.r1}, {self.r2})", f"layer={site.layer}", cores]
        if site.transpose:
            parts.append("transpose=True")
        if site.columns:
            parts.append(f"columns={site.columns}")
        return ", ".join([*parts, f"scale={self.scale_value:g}"])

    def draw_masks(self, n_layers: int) -> Masks | None:
        """Draw dropout masks for ``n_layers`` layers; None if nothing is dropped (p = 0 or eval mode)."""
        if not self.training or self.dropout == 0:
            return None
        n_scopes = 1 + max(
            [0, *[binding.site.mask_scope for binding in self.bindings]]
        )  # torch 2.13 cannot trace max(default=)
        shapes = (
            (n_layers, n_scopes, *self.U.shape),
            (n_layers, *self.C.shape[1:]),
            (n_layers, n_scopes, *self.V.shape),
        )
        return Masks(*(torch.rand(shape, device=self.U.device) >= self.dropout for shape in shapes))

    def compose(self, sites: Sequence[Site]) -> list[Operands]:
        """Return (D, G) of each site. Sites of one kind are contracted together.

        All experts of a site share both U and V, so nothing is contracted for them. The operands of such a site are
        (D [in_features, r], C [experts, r, blocks * r'], V [r', out_features / blocks]), where C contains the scale.
        The update of block b of expert e is ``D C[e, :, b r' : (b + 1) r'] V``. For such a site, :meth:`evaluated`
        returns G [experts, r, out_features].
        """
        layers, kinds = self._kinds_of(sites)
        masks = self.draw_masks(len(layers))
        found: dict[int, Operands] = {}
        for alike, rows, members in kinds:
            site, n = alike[0], len(alike)
            if site.experts:
                D, C, V = self._expert_kind(site, rows, layers, masks)
                operands = [per_site(D, n), per_site(C, n, 4), per_site(V, n)]
            else:
                D, G = self._scaled(alike, *self._contract_kind(site, rows, layers, masks))
                operands = [per_site(D, n), per_site(G, n)]
                _packed.attach(D, G, operands[1])
            found.update(zip(members, zip(*operands, strict=True), strict=True))
        return [found[i] for i in range(len(sites))]

    def _kinds_of(self, sites: Sequence[Site]) -> tuple[list[int], list[_Kind]]:
        """Return the layers of the sites in ascending order, and the kinds of the sites.

        The result for the last list of sites is kept, because every forward pass composes the same sites.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and self._last_kinds is not None and self._last_kinds[0] == sites:
            return self._last_kinds[1:]
        layers = sorted({site.layer for site in sites})
        members: dict[Hashable, list[int]] = {}
        for i, site in enumerate(sites):
            members.setdefault((*_part(site)[1:], site.experts, *self._has_diagonals(site)), []).append(i)
        kinds = [
            _Kind([sites[i] for i in indices], [layers.index(sites[i].layer) for i in indices], indices)
            for indices in members.values()
        ]
        if not compiling:
            self._last_kinds = list(sites), layers, kinds
        return layers, kinds

    def _has_diagonals(self, site: Site) -> tuple[bool, bool]:
        """Return whether the site has a row of ``a``, and whether it has rows of ``b``."""
        if self.a is self.b is None:
            return False, False
        return _part(site) in self._rows_of_a, _part(site) in self._rows_of_b

    def _scaled(self, sites: list[Site], D: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
        """Multiply D [in, r] or [n, in, r] and G [1, r, out] or [n, r, out] by the diagonals of n sites of one kind."""
        of_input, of_output = self._diagonals(sites)
        D = D if of_input is None else D * of_input[:, :, None]
        G = G if of_output is None else G * of_output[:, None, :]
        return D, G

    def _diagonals(self, sites: list[Site]) -> tuple[Tensor | None, Tensor | None]:
        """Return the diagonals [n, in] and [n, out] of n sites of one kind; None on a side without diagonals."""
        first, last = sites[0].columns or (0, self.d_out)
        of_U = of_V = None
        has_a, has_b = self._has_diagonals(sites[0])
        if self.a is not None and has_a:
            of_U = take(self.a, 0, [row for site in sites for row in self._rows_of_a[_part(site)]])
        if self.b is not None and has_b:
            of_V = take(self.b, 0, [row for site in sites for row in self._rows_of_b[_part(site)]])
            of_V = of_V[:, first:last].reshape(len(sites), -1)
        return (of_V, of_U) if sites[0].transpose else (of_U, of_V)

    def diagonals(self, site: Site) -> tuple[Tensor | None, Tensor | None]:
        """Return the diagonals of a site: [in_features] and [out_features], or None on a side without a diagonal."""
        of_input, of_output = (None if rows is None else rows[0] for rows in self._diagonals([site]))
        return of_input, of_output

    def _contract_kind(
        self, site: Site, rows: list[int], layers: list[int], masks: Masks | None
    ) -> tuple[Tensor, Tensor]:
        """Return D [in, r] and G [len(rows), r, out] for sites that differ only in the layer.

        ``rows`` are indices into ``layers`` and the masks. With dropout, D is [len(rows), in, r]. Without dropout, G is
        [1, r, out] for all layers if the layers share both the cores and the scale.
        """
        keep = 1.0 - self.dropout
        first, last = site.columns or (0, self.d_out)
        V = self.V[:, first:last] if site.columns else self.V
        C = self._scaled_cores([layers[row] for row in rows], list(site.cores))
        if masks is None:
            if site.transpose:
                return V.t(), tt_contract(C.transpose(-1, -2), self.U.t(), scale=self.initial_scale)
            return self.U, tt_contract(C, V, scale=self.initial_scale)
        keep_U = take(masks.U[:, site.mask_scope], 0, rows)
        keep_C = take(take(masks.C, 1, list(site.cores)), 0, rows)
        keep_V = take(masks.V[:, site.mask_scope, :, first:last], 0, rows)
        C = C.expand_as(keep_C)
        scale = self.initial_scale / keep**2
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

    def _expert_kind(
        self, site: Site, rows: list[int], layers: list[int], masks: Masks | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return D [in, r], C [len(rows), experts, r, blocks * r'] and V [r', out] for sites of experts of one kind.

        ``rows`` are indices as in :meth:`_contract_kind`. With dropout, D and V have an additional first dimension of
        length len(rows). Without dropout, the first dimension of C is 1 if the layers share both the cores and the
        scale.
        """
        keep = 1.0 - self.dropout
        first, last = site.columns or (0, self.d_out)
        U: Tensor = self.U
        V: Tensor = self.V[:, first:last]
        C = self._scaled_cores([layers[row] for row in rows], list(site.cores))
        scale = self.initial_scale
        if masks is not None:
            U = U * take(masks.U[:, site.mask_scope], 0, rows) / keep
            C = C * take(take(masks.C, 1, list(site.cores)), 0, rows)
            V = V * take(masks.V[:, site.mask_scope, :, first:last], 0, rows) / keep
            scale = scale / keep
        if site.transpose:
            U, C, V = V.transpose(-1, -2), C.transpose(-1, -2), U.transpose(-1, -2)
        C = C.unflatten(1, (site.experts, site.blocks)).transpose(2, 3).flatten(3)
        return U, C * scale, V

    def pair(self, site: Site, D: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        """Return (D [in_features, r], G [r, out_features]); for a site of experts G is [experts, r, out_features]."""
        if not site.experts:
            return super().pair(site, D, *rest)
        C, V = rest
        G = C.unflatten(-1, (site.blocks, -1)) @ V  # [experts, r, blocks, out]
        return D, (G.transpose(-1, -2) if site.interleaved else G).flatten(-2)

    def _scaled_cores(self, layers: list[int], cores: list[int]) -> Tensor:  # [len(layers) or 1, len(cores), r1, r2]
        """Return the given cores of the given layers, multiplied by the trained part of the scale."""
        C = take(self.C, 1, cores)
        if self.core_sharing == "per_layer":
            C = take(C, 0, layers)
        log_scale = self._log_scale()
        if log_scale is None:
            return C
        if log_scale.numel() > 1:
            log_scale = take(take(log_scale, 1, cores), 0, layers)
        return C * log_scale.exp().to(C)[..., None, None]

    def extra_repr(self) -> str:
        return (
            f"d_in={self.d_in}, d_out={self.d_out}, rank=({self.r1}, {self.r2}), n_layers={self.n_layers}, "
            f"n_cores={self.n_cores}, core_sharing={self.core_sharing!r}, scale={self.scale_value:g}, "
            f"dropout={self.dropout}"
        )
