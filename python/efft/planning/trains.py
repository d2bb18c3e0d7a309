"""The trains of EFFT: which weights share one, and which part of it each of them uses.

Where a table knows the roles of a block's layers (:data:`efft.planning.targets.FAMILIES`) the trains are the paper's.
Elsewhere they follow from shapes (:mod:`efft.planning.shapes`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from efft.config import EfftConfig, is_size
from efft.planning.shapes import Train, trains_by_shape
from efft.planning.targets import FFN_ROLES, MHSA_ROLES, Target
from efft_kernels import Site, TTFactors
from efft_kernels.nn.initialization import automatic_scale


@dataclass
class TrainGroup(Train):
    """One train of EFFT with what its configuration says of it; with shared cores C has one layer."""

    rank: tuple[int, int]
    config: EfftConfig
    trainable_scale: bool | Literal["matrix"]

    @property
    def n_parameters(self) -> int:
        """Number of trainable parameters of the bank."""
        r1, r2 = self.rank
        scales = self.n_layers * self.n_cores if self.trainable_scale == "matrix" else int(self.trainable_scale)
        return self.d_in * r1 + self._all_cores * r1 * r2 + r2 * self.d_out + scales

    @property
    def _all_cores(self) -> int:
        return self.n_cores * (self.n_layers if self.config.core_sharing == "per_layer" else 1)

    def describe(self) -> str:
        """The group in one line."""
        r1, r2 = self.rank
        asked = self.config.rank_of(self.name, self.kind)
        return (
            f"{self.name}: {_counted(len(self.sites), 'weight')}; U [{self.d_in}, {r1}], "
            f"{_counted(self._all_cores, 'core')} [{r1}, {r2}], V [{r2}, {self.d_out}]; "
            f"{self.n_parameters:,} parameters" + ("" if asked == self.rank else f" (rank cut from {asked})")
        )

    def to_dict(self) -> dict[str, Any]:
        """The group as an adapter file keeps it."""
        return {
            "name": self.name,
            "kind": self.kind,
            "sizes": [self.d_in, self.d_out, self.n_layers, self.n_cores],
            "rank": list(self.rank),
            "trainable_scale": self.trainable_scale,
            "weights": {name: _text_of(site) for name, site in self.sites.items()},
        }

    @property
    def scale(self) -> float:
        """s, computed where the configuration leaves it to the library."""
        scale = self.config.scale_of(self.name, self.kind)
        if not isinstance(scale, str):
            return scale
        init = self.config.init_of(self.kind)
        return automatic_scale(self.d_in, self.d_out, self._all_cores, *self.rank, init, self.config.core_init)

    def build(self, device: torch.device, dtype: torch.dtype) -> TTFactors:
        """Allocate and initialise the bank."""
        return TTFactors(
            self.d_in,
            self.d_out,
            self.rank,
            n_layers=self.n_layers,
            n_cores=self.n_cores,
            core_sharing=self.config.core_sharing,
            scale=self.scale,
            trainable_scale=self.trainable_scale,
            dropout=self.config.dropout,
            init=self.config.init_of(self.kind),
            core_init=self.config.core_init,
            device=device,
            dtype=dtype,
        )


def _counted(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def group_of_file(config: EfftConfig, saved: dict[str, Any]) -> TrainGroup:
    """The group that :meth:`TrainGroup.to_dict` wrote down.

    Raises:
        ValueError: it is damaged.
    """
    kind: Any = saved.get("kind")
    sizes: Any = saved.get("sizes")
    rank: Any = saved.get("rank")
    trained: Any = saved.get("trainable_scale")
    fine = isinstance(kind, str) and _are_sizes(sizes, 4) and _are_sizes(rank, 2) and trained in (False, True, "matrix")
    if not fine:
        raise ValueError(f"the plan of group {saved['name']!r} is damaged")
    d_in, d_out, n_layers, n_cores = sizes
    if n_cores > _MOST_CORES:
        raise ValueError(f"the plan of group {saved['name']!r} is damaged: {n_cores} cores for each layer")
    sites = {name: _site_of(text, n_cores) for name, text in saved["weights"].items()}
    return TrainGroup(saved["name"], kind, d_in, d_out, n_layers, n_cores, sites, (rank[0], rank[1]), config, trained)


#: A file with more is damaged: a mixture of experts has three cores for each of at most thousands of experts.
_MOST_CORES = 2**16


def _are_sizes(values: Any, n: int) -> bool:
    return isinstance(values, list) and len(values) == n and all(is_size(value, 2**24) for value in values)


def _text_of(site: Site) -> str:
    """``layer=3 cores=0:3 ...``: what differs from a plain site, in words."""
    first, n = site.cores[0], len(site.cores)
    assert site.cores == tuple(range(first, first + n)), "a site takes cores that follow one another"
    words = [f"layer={site.layer}", f"cores={first}:{first + n}"]
    words += [f"columns={site.columns[0]}:{site.columns[1]}"] if site.columns else []
    words += [f"mask_scope={site.mask_scope}"] if site.mask_scope else []
    words += [f"experts={site.experts}"] if site.experts else []
    words += [name for name in ("transpose", "interleaved") if getattr(site, name)]
    return " ".join(words)


_SITE = re.compile(
    r"layer=(?P<layer>\d{1,7}) cores=(?P<first>\d{1,7}):(?P<end>\d{1,7})"
    r"(?: columns=(?P<left>\d{1,7}):(?P<right>\d{1,7}))?"
    r"(?: mask_scope=(?P<mask_scope>\d))?(?: experts=(?P<experts>\d{1,7}))?(?P<transpose> transpose)?"
    r"(?P<interleaved> interleaved)?"
)


def _site_of(text: str, n_cores: int) -> Site:
    match = _SITE.fullmatch(text)
    if match is None or int(match["end"]) > n_cores:
        raise ValueError(f"'plan' has a site that is not one: {text[:80]!r}")
    numbers = {name: int(value or 0) for name, value in match.groupdict().items() if not (value or "").startswith(" ")}
    return Site(
        numbers["layer"],
        tuple(range(numbers["first"], numbers["end"])),
        bool(match["transpose"]),
        (numbers["left"], numbers["right"]) if match["left"] else None,
        numbers["mask_scope"],
        numbers["experts"],
        bool(match["interleaved"]),
    )


def efft_groups(config: EfftConfig, targets: list[Target]) -> list[TrainGroup]:
    """The trains of EFFT for these weights (see :meth:`EfftConfig.groups`)."""
    by_shape = isinstance(config.targets, str) and all(t.role == "linear" for t in targets)
    trains = trains_by_shape(targets) if by_shape else [*_by_role(config, targets), *_of_experts(targets)]
    scales: dict[Any, bool | Literal["matrix"]] = {"group": True, "matrix": "matrix", "global": True}
    trained = scales.get(config.trainable_scale, False)
    groups: list[TrainGroup] = []
    entries = {target.name: target.weight.numel for target in targets}
    for train in trains:
        rank = config.rank_of(train.name, train.kind)
        scale = False if groups and config.trainable_scale == "global" else trained
        group = TrainGroup(**vars(train), rank=rank, config=config, trainable_scale=scale)
        if by_shape:
            size = sum(entries[name] for name in train.sites)
            _cut_rank(group, size)
            if group.n_parameters >= size and config.targets != "all-linear":  # vectors, by any name
                continue
        groups.append(group)
    if not groups:
        raise ValueError(
            f"targets={config.targets!r} finds weights alone that have fewer entries than an update of them"
        )
    for field in ("rank", "scale"):
        value = getattr(config, field)
        known = {g.name for g in groups} | {g.kind for g in groups}
        if isinstance(value, dict) and not set(value) <= known:
            raise ValueError(
                f"EfftConfig.{field} names {sorted(set(value) - known)}, but the groups of this model are "
                f"{sorted(known)}"
            )
    return groups


def _cut_rank(group: TrainGroup, size: int) -> None:
    """Bound the rank by the sizes, and such that the group has fewer parameters than the ``size`` entries of its
    weights, if any rank does that."""
    r1, r2 = group.rank
    for r in range(max(r1, r2), 0, -1):
        group.rank = min(r, r1, group.d_in), min(r, r2, group.d_out)
        if group.n_parameters < size:
            return


def _of_experts(targets: list[Target]) -> list[Train]:
    return trains_by_shape([target for target in targets if target.weight.n_experts])


def _by_role(config: EfftConfig, targets: list[Target]) -> list[Train]:
    members: dict[tuple[str, str], list[Target]] = {}
    for target in targets:
        if not target.weight.n_experts:
            members.setdefault(_group_of(target, config), []).append(target)
    trains = []
    for (name, kind), together in members.items():
        d_in, d_out, n_cores, sites = _LAYOUTS[kind](name, {t.name: _Shape(t) for t in together})
        trains.append(Train(name, kind, d_in, d_out, len({t.block for t in together}), n_cores, sites))
    return trains


class _Shape:
    """A target with its sizes."""

    def __init__(self, target: Target) -> None:
        self.role, self.block = target.role, target.block
        self.d_in, self.d_out = target.weight.d_in, target.weight.d_out


_Layers = dict[str, _Shape]
_Layout = tuple[int, int, int, dict[str, Site]]  # d_in, d_out, n_cores, sites


def _group_of(target: Target, config: EfftConfig) -> tuple[str, str]:
    """(name, kind) of the group that a target belongs to."""
    if target.role == "linear":
        # Convolutions and embeddings are in such groups too. Adapter files and state dicts have the name: it stays.
        return f"linear_{target.weight.d_in}x{target.weight.d_out}", "linear"
    kind = "joint" if config.variant == "efft1" else "mhsa" if target.role in MHSA_ROLES else "ffn"
    return kind if target.stage is None else f"stage{target.stage + 1}_{kind}", kind


def _block_index(layers: _Layers) -> dict[str, int]:
    return {block: i for i, block in enumerate(dict.fromkeys(s.block for s in layers.values()))}


def _width(name: str, what: str, layers: _Layers, size: Callable[[_Shape], int | None]) -> int | None:
    """The one value of ``size`` over all layers that have one; ValueError if they disagree."""
    sizes = {n: v for n, s in layers.items() if (v := size(s)) is not None}
    if len(set(sizes.values())) > 1:
        first = next(iter(sizes))
        other = next(n for n in sizes if sizes[n] != sizes[first])
        raise ValueError(
            f"group {name!r}: layers that share factors must agree in {what}, but {first} has {sizes[first]} and "
            f"{other} has "
            f"{sizes[other]}; exclude one of them or name the layers of each size (targets=[...])"
        )
    return next(iter(sizes.values()), None)


def _attention_parts(role: str) -> tuple[str, ...]:
    return ("q", "k", "v") if role == "qkv" else (role,)


def _attention_width(name: str, layers: _Layers) -> int:
    """d of attention layers [d, d], with fused qkv counted as three."""
    for layer, shape in layers.items():
        n_parts = len(_attention_parts(shape.role))
        if shape.d_out % n_parts:
            raise ValueError(
                f"group {name!r}: {layer} has {shape.d_out} outputs, not a multiple of its {n_parts} matrices"
            )
    d = _width(name, "input size", layers, lambda s: s.d_in)
    # Keys and values may be narrower (grouped queries): they use the first columns of V.
    outs = {n: s for n, s in layers.items() if not (s.role in ("k", "v") and s.d_out < s.d_in)}
    out = _width(name, "output size of each of q, k, v, o", outs, lambda s: s.d_out // len(_attention_parts(s.role)))
    assert d is not None
    if out not in (d, None):
        raise ValueError(
            f"group {name!r}: attention matrices must be square, got {d} inputs and {out} outputs of each of q, k, "
            f"v, o; "
            "give these layers by name (targets=[...])"
        )
    return d


def _mhsa(name: str, layers: _Layers) -> _Layout:
    """U [d, r1], one core for each of q, k, v, o that is adapted, V [r2, d]."""
    d = _attention_width(name, layers)
    present = {part for s in layers.values() for part in _attention_parts(s.role)}
    core = {part: i for i, part in enumerate(p for p in "qkvo" if p in present)}
    index = _block_index(layers)
    sites = {}
    for n, s in layers.items():
        parts = _attention_parts(s.role)
        columns = None if s.d_out == d * len(parts) else (0, s.d_out)
        sites[n] = Site(index[s.block], tuple(core[p] for p in parts), columns=columns)
    return d, d, len(core), sites


def _mlp_sizes(name: str, layers: _Layers) -> tuple[int, int, int]:
    """(d, hidden size, blocks of fc1): a gated fc1 has two output blocks of the hidden size."""
    d = _width(name, "model width", layers, lambda s: s.d_out if s.role == "fc2" else s.d_in)
    hidden = _width(name, "hidden size of fc2", layers, lambda s: s.d_in if s.role == "fc2" else None)
    up = _width(name, "output size of fc1", layers, lambda s: None if s.role == "fc2" else s.d_out)
    hidden = hidden or up
    assert d is not None
    assert hidden is not None
    if up is not None and up % hidden:
        raise ValueError(
            f"group {name!r}: fc1's {up} outputs are not a multiple of fc2's {hidden} inputs, so they cannot share a "
            f"train; "
            "give these layers by name (targets=[...])"
        )
    return d, hidden, (up or hidden) // hidden


def _ffn(name: str, layers: _Layers) -> _Layout:
    """U [d, r1], V [r2, hidden]; fc1 and gate = U C V, fc2 = (U C V)ᵀ with a core and dropout masks of its own."""
    d, hidden, up_blocks = _mlp_sizes(name, layers)
    roles = {s.role for s in layers.values()}
    cores: dict[str, tuple[int, ...]] = {}
    n_cores = 0
    for role, n_blocks in (("fc1", up_blocks), ("gate", up_blocks), ("fc2", 1)):
        if role in roles:
            cores[role] = tuple(range(n_cores, n_cores + n_blocks))
            n_cores += n_blocks
    index = _block_index(layers)
    sites = {
        n: Site(index[s.block], cores[s.role], transpose=s.role == "fc2", mask_scope=int(s.role == "fc2"))
        for n, s in layers.items()
    }
    return d, hidden, n_cores, sites


def _joint(name: str, layers: _Layers) -> _Layout:
    """EFFT1: U [d, r1], V [r2, 4 d]; [q|k|v|o] = U C V in four column blocks, fc1 = U C V, fc2 = (U C V)ᵀ."""
    attention = {n: s for n, s in layers.items() if s.role in MHSA_ROLES}
    mlp = {n: s for n, s in layers.items() if s.role in FFN_ROLES}
    widths = []
    if attention:
        d = _attention_width(name, attention)
        widths.append((d, 4 * d))
    if mlp:
        d, hidden, up_blocks = _mlp_sizes(name, mlp)
        widths.append((d, hidden * up_blocks))
        if up_blocks != 1:
            widths.append((d, hidden))
    if len(set(widths)) > 1:
        raise ValueError(
            f"group {name!r}: efft1 takes [q|k|v|o] and the MLP as matrices of one size, got {widths}; use "
            f"variant='efft2'"
        )
    d, d_out = widths[0]
    present = {("qkvo" if n in attention else s.role) for n, s in layers.items()}
    parts_in_order: list[str] = [part for part in ("qkvo", *FFN_ROLES) if part in present]
    core = {part: i for i, part in enumerate(parts_in_order)}
    scope = {"qkvo": 0, "fc1": 1, "fc2": 2, "gate": 3}
    index = _block_index(layers)
    sites = {}
    for n, s in layers.items():
        if n in attention:
            parts = _attention_parts(s.role)
            first = "qkvo".index(parts[0]) * d
            columns = (first, first + s.d_out)
            sites[n] = Site(index[s.block], (core["qkvo"],), columns=columns, mask_scope=scope["qkvo"])
        else:
            sites[n] = Site(index[s.block], (core[s.role],), transpose=s.role == "fc2", mask_scope=scope[s.role])
    return d, d_out, len(core), sites


def _linear(name: str, layers: _Layers) -> _Layout:
    """Layers of one shape given by name: U [d_in, r1], one core each, V [r2, d_out]."""
    shape = next(iter(layers.values()))
    return shape.d_in, shape.d_out, 1, {n: Site(i) for i, n in enumerate(layers)}


_LAYOUTS: dict[str, Callable[[str, _Layers], _Layout]] = {
    "mhsa": _mhsa,
    "ffn": _ffn,
    "joint": _joint,
    "linear": _linear,
}
