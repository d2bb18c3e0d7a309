"""Create tensor trains for any architecture, based only on the shapes of the weights.

Weights of equal shape share a tensor train, and weights of the transposed shape use the transpose of the same train.
Every tower (such as the encoder, the decoder or the vision part) has its own trains. As in the paper, attention and MLP
also have their own trains if they are known. A packed projection, such as q, k and v in one weight, is split if the
attention or the MLP of the same block has another matrix with the shape of the parts. The experts of a mixture share a
train with one core per expert.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from efft.planning.targets import Target
from efft_kernels import Site

#: Maximum number of parts of a packed projection: q, k, v and a gate.
_MOST_PARTS = 4


@dataclass
class TensorTrain:
    """Hold the sizes of a tensor train: ``U [d_in, r1]``, ``C [n_layers, n_cores, r1, r2]``, ``V [r2, d_out]``.

    ``sites`` maps the name of each weight to the part of the tensor train that the weight uses.
    """

    name: str
    kind: str
    d_in: int
    d_out: int
    n_layers: int
    n_cores: int
    sites: dict[str, Site]


@dataclass(frozen=True)
class _Member:
    """A weight that consists of ``n`` adjacent matrices ``[d_in, d_out]``."""

    target: Target
    d_in: int
    d_out: int
    n: int

    @property
    def key(self) -> tuple[str | None, str | None, frozenset[int], int]:
        """The properties that all members of a tensor train have in common."""
        weight = self.target.weight
        return weight.tower, self.target.part, frozenset((self.d_in, self.d_out)), weight.n_experts


def trains_by_shape(targets: Iterable[Target]) -> list[TensorTrain]:
    """Return the tensor trains of the given weights.

    The name of a train contains the part of the block. If one part has several trains, the name also contains the shape
    and the tower.
    """
    groups: dict[tuple[str | None, str | None, frozenset[int], int], list[_Member]] = defaultdict(list)
    for member in _members(list(targets)):
        groups[member.key].append(member)
    found = []
    for key, members in groups.items():
        for layout in _layouts(members):
            found.append((key, layout))
    return [
        TensorTrain(name, key[1] or "linear", *layout)
        for name, (key, layout) in zip(_names([(key, layout[:2]) for key, layout in found]), found, strict=True)
    ]


_Layout = tuple[int, int, int, int, dict[str, Site]]  # d_in, d_out, n_layers, n_cores, sites


def _members(targets: list[Target]) -> list[_Member]:
    shapes: dict[tuple[str | None, str | None], set[tuple[int, int]]] = defaultdict(set)  # by block and part
    for target in targets:
        shapes[target.weight.block, target.part].add((target.weight.d_in, target.weight.d_out))
    members = []
    for target in targets:
        weight = target.weight
        if weight.experts is not None:
            blocks = weight.experts.blocks
            members.append(_Member(target, weight.d_in, weight.d_out // blocks, blocks))
            continue
        n = (
            _parts(weight.d_in, weight.d_out, shapes[weight.block, target.part])
            if weight.kind in ("linear", "attention", "parameter")
            else 1
        )
        members.append(_Member(target, weight.d_in, weight.d_out // n, n))
    return members


def _parts(d_in: int, d_out: int, shapes: set[tuple[int, int]]) -> int:
    """Return the number of matrices that are packed in a weight, inferred from the other shapes in its block."""
    if (d_out, d_in) in shapes:  # another weight reads all its outputs, so this weight is one matrix
        return 1
    for n in range(2, _MOST_PARTS + 1):
        part = d_out // n
        if d_out % n == 0 and ((d_in, part) in shapes or (part, d_in) in shapes):
            return n
    return 1


def _layouts(members: list[_Member]) -> list[_Layout]:
    """Lay out one tensor train for the members, or several if some members are packed and the blocks differ."""
    if members[0].target.weight.n_experts:
        return [_expert_layout(members)]
    if all(member.n == 1 for member in members):
        return [_flat_layout(members)]
    blocks: dict[str | None, list[_Member]] = defaultdict(list)
    for member in members:
        blocks[member.target.weight.block].append(member)
    first = members[next(i for i, member in enumerate(members) if member.n > 1)]
    places = {tuple((m.target.weight.place, m.n, _is_transposed(m, first)) for m in own) for own in blocks.values()}
    if len(places) == 1 and not any(n > 1 and turned for _, n, turned in next(iter(places))):
        return [_block_layout(list(blocks.values()), first)]
    plain = [member for member in members if member.n == 1]
    packed: dict[tuple[int, int], list[_Member]] = defaultdict(list)
    for member in members:
        if member.n > 1:
            packed[member.d_in, member.d_out * member.n].append(
                _Member(member.target, member.d_in, member.d_out * member.n, 1)
            )
    return [_flat_layout(own) for own in [plain, *packed.values()] if own]


def _is_transposed(member: _Member, first: _Member) -> bool:
    """Return whether a member uses the transpose of a tensor train with the shape of ``first``."""
    return (member.d_in, member.d_out) != (first.d_in, first.d_out)


def _flat_layout(members: list[_Member]) -> _Layout:
    """Assign consecutive cores to the members."""
    first = members[0]
    sites = {}
    for i, member in enumerate(members):
        turned = _is_transposed(member, first)
        sites[member.target.name] = Site(i, transpose=turned, mask_scope=int(turned))
    return first.d_in, first.d_out, len(members), 1, sites


def _block_layout(blocks: list[list[_Member]], first: _Member) -> _Layout:
    """Assign the same number of cores to each block. The members of a block use consecutive cores."""
    sites = {}
    n_cores = sum(member.n for member in blocks[0])
    for layer, own in enumerate(blocks):
        core = 0
        for member in own:
            turned = _is_transposed(member, first)
            cores = tuple(range(core, core + member.n))
            sites[member.target.name] = Site(layer, cores, transpose=turned, mask_scope=int(turned))
            core += member.n
    return first.d_in, first.d_out, len(blocks), n_cores, sites


def _expert_layout(members: list[_Member]) -> _Layout:
    """Assign cores to each mixture: the cores for all experts of its first parameter, then of the next parameter."""
    mixtures: dict[str, list[_Member]] = defaultdict(list)
    for member in members:
        mixtures[member.target.weight.module].append(member)
    counts = {tuple(m.n for m in own) for own in mixtures.values()}
    if len(counts) > 1:  # the mixtures differ, so each parameter is its own layer
        mixtures = {member.target.name: [member] for member in members}
    if len({sum(m.n for m in own) for own in mixtures.values()}) > 1:
        raise ValueError(
            f"experts of one size are packed differently in {members[0].target.name} and in other mixtures of this "
            "model: name the experts of each kind separately (targets=[...])"
        )
    first = members[0]
    sites = {}
    for layer, own in enumerate(mixtures.values()):
        core = 0
        for member in own:
            weight = member.target.weight
            assert weight.experts is not None
            cores = tuple(range(core, core + member.n * weight.n_experts))
            turned = _is_transposed(member, first)
            sites[weight.name] = Site(
                layer,
                cores,
                transpose=turned,
                mask_scope=int(turned),
                experts=weight.n_experts,
                interleaved=weight.experts.interleaved,
            )
            core += len(cores)
    n_cores = sum(member.n * member.target.weight.n_experts for member in next(iter(mixtures.values())))
    return first.d_in, first.d_out, len(mixtures), n_cores, sites


def _names(
    trains: list[tuple[tuple[str | None, str | None, frozenset[int], int], tuple[int, int]]],
) -> list[str]:
    """Return a name for each tensor train.

    The name is the first unique one of: part; part and shape; tower, part and shape.
    """
    candidates = []
    for (tower, part, _, n_experts), (d_in, d_out) in trains:
        kind = "experts" if n_experts else part or "linear"
        shaped = f"{kind}_{d_in}x{d_out}"
        around = re.sub(r"\W", "_", tower or "model")  # module names can be "0" or "left-hand side"
        around = around if around.isidentifier() else f"part_{around}"
        candidates.append([*([kind] if kind != "linear" else []), shaped, f"{around}_{shaped}"])
    names: list[str] = []
    counts = Counter(name for own in candidates for name in dict.fromkeys(own))
    for i, own in enumerate(candidates):
        name = next((name for name in own if counts[name] == 1), own[-1])
        names.append(name if name not in names else f"{name}_{i}")
    return names
