"""Create the tensor trains of the paper, for layers whose role in their block is known.

The role of a layer is its purpose in the block, such as "qkv" or "fc2". The table
:data:`efft.planning.targets.FAMILIES` lists the roles of the layers of a ViT, a Swin and related models. For other
models, the trains are derived only from shapes (:mod:`efft.planning.shapes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from efft.planning.shapes import TensorTrain
from efft.planning.targets import FFN_ROLES, MHSA_ROLES, Target
from efft_kernels import Site


def trains_by_role(targets: Iterable[Target], joint: bool) -> list[TensorTrain]:
    """Return the tensor trains of the given weights: one for attention and one for the MLP of each stage.

    A model whose widths do not change has only one stage. With ``joint``, attention and MLP share one tensor train.
    Layers without a role share a tensor train with all other layers of the same shape.

    Raises:
        ValueError: layers that would share a train have sizes that do not fit together.
    """
    members: dict[tuple[str, str], list[Target]] = {}
    for target in targets:
        members.setdefault(_group_of(target, joint), []).append(target)
    trains = []
    for (name, kind), together in members.items():
        d_in, d_out, n_cores, sites = _LAYOUTS[kind](name, {t.name: _Shape(t) for t in together})
        trains.append(TensorTrain(name, kind, d_in, d_out, len({t.block for t in together}), n_cores, sites))
    return trains


class _Shape:
    """Hold the role, the block and the sizes of a target."""

    def __init__(self, target: Target) -> None:
        self.role, self.block = target.role, target.block
        self.d_in, self.d_out = target.weight.d_in, target.weight.d_out


_Layers = dict[str, _Shape]
_Layout = tuple[int, int, int, dict[str, Site]]  # d_in, d_out, n_cores, sites


def _group_of(target: Target, joint: bool) -> tuple[str, str]:
    """Return the name and the kind of the tensor train that a target uses."""
    if target.role == "linear":
        # Such groups also contain convolutions and embeddings. Adapter files and state dicts contain the name "linear",
        # which must therefore not change.
        return f"linear_{target.weight.d_in}x{target.weight.d_out}", "linear"
    kind = "joint" if joint else "mhsa" if target.role in MHSA_ROLES else "ffn"
    return kind if target.stage is None else f"stage{target.stage + 1}_{kind}", kind


def _block_index(layers: _Layers) -> dict[str, int]:
    return {block: i for i, block in enumerate(dict.fromkeys(s.block for s in layers.values()))}


def _width(name: str, what: str, layers: _Layers, size: Callable[[_Shape], int | None]) -> int | None:
    """Return the common value of ``size`` over all layers that have a value. Raise ValueError if the values differ."""
    sizes = {n: v for n, s in layers.items() if (v := size(s)) is not None}
    if len(set(sizes.values())) > 1:
        first = next(iter(sizes))
        other = next(n for n in sizes if sizes[n] != sizes[first])
        raise ValueError(
            f"group {name!r}: layers that share factors must agree in {what}, but {first!r} has {sizes[first]} and "
            f"{other!r} has {sizes[other]}; exclude one of them or name the layers of each size (targets=[...])"
        )
    return next(iter(sizes.values()), None)


def _attention_parts(role: str) -> tuple[str, ...]:
    return ("q", "k", "v") if role == "qkv" else (role,)


def _attention_width(name: str, layers: _Layers) -> int:
    """Return the width d of attention matrices [d, d]. A fused qkv layer counts as three matrices."""
    for layer, shape in layers.items():
        n_parts = len(_attention_parts(shape.role))
        if shape.d_out % n_parts:
            raise ValueError(
                f"group {name!r}: the {shape.d_out} outputs of {layer!r} are not a multiple of its {n_parts} matrices"
            )
    d = _width(name, "input size", layers, lambda s: s.d_in)
    # Keys and values may be narrower (grouped-query attention). They then use the first columns of V.
    outs = {n: s for n, s in layers.items() if not (s.role in ("k", "v") and s.d_out < s.d_in)}
    out = _width(name, "output size of each of q, k, v, o", outs, lambda s: s.d_out // len(_attention_parts(s.role)))
    assert d is not None
    if out not in (d, None):
        raise ValueError(
            f"group {name!r}: attention matrices must be square, got {d} inputs and {out} outputs of each of q, k, "
            "v, o; select these layers by name (targets=[...])"
        )
    return d


def _mhsa(name: str, layers: _Layers) -> _Layout:
    """Lay out U [d, r1], one core for each adapted matrix of q, k, v and o, and V [r2, d]."""
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
    """Return (d, hidden size, number of blocks of fc1). A gated fc1 has two output blocks of the hidden size."""
    d = _width(name, "model width", layers, lambda s: s.d_out if s.role == "fc2" else s.d_in)
    hidden = _width(name, "hidden size of fc2", layers, lambda s: s.d_in if s.role == "fc2" else None)
    up = _width(name, "output size of fc1", layers, lambda s: None if s.role == "fc2" else s.d_out)
    hidden = hidden or up
    assert d is not None
    assert hidden is not None
    if up is not None and up % hidden:
        raise ValueError(
            f"group {name!r}: fc1's {up} outputs are not a multiple of fc2's {hidden} inputs, so they cannot share a "
            "train; select these layers by name (targets=[...])"
        )
    return d, hidden, (up or hidden) // hidden


def _ffn(name: str, layers: _Layers) -> _Layout:
    """Lay out U [d, r1] and V [r2, hidden].

    The updates of fc1 and gate are U C V. The update of fc2 is (U C V)ᵀ with its own core and its own dropout masks.
    """
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
    """Lay out the single tensor train of EFFT1: U [d, r1], V [r2, 4 d].

    The matrices q, k, v and o side by side have the update U C V. The update of fc1 is U C V, and the update of fc2 is
    the transpose of such a product. Each of these products has its own core.
    """
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
            "variant='efft2'"
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
    """Lay out layers of equal shape that the user named: U [d_in, r1], one core per layer, and V [r2, d_out]."""
    shape = next(iter(layers.values()))
    return shape.d_in, shape.d_out, 1, {n: Site(i) for i, n in enumerate(layers)}


_LAYOUTS: dict[str, Callable[[str, _Layers], _Layout]] = {
    "mhsa": _mhsa,
    "ffn": _ffn,
    "joint": _joint,
    "linear": _linear,
}
