"""Select the weights of a model to adapt and find the role of each weight in its block."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from efft.adapting.heads import find_head as find_head
from efft.hints import nearest
from efft.planning.names import matcher
from efft.planning.structure import KINDS, Structure, Weight, parts_of, structure_of

#: Keywords that ``targets`` accepts instead of a list of names.
TARGETS = ("all", "all-linear", "mhsa", "ffn")

MHSA_ROLES = ("qkv", "q", "k", "v", "o")
FFN_ROLES = ("fc1", "gate", "fc2")  # a gated MLP has fc1 and gate as two layers or packed in one fc1
_PART_OF = dict.fromkeys(MHSA_ROLES, "mhsa") | dict.fromkeys(FFN_ROLES, "ffn")

# Each of these tables maps the ending of a layer's name to the role of the layer.
_TIMM = {"attn.qkv": "qkv", "attn.proj": "o", "mlp.fc1": "fc1", "mlp.fc2": "fc2"}
#: Names in transformers 5 for ViT, DeiT, DINOv2, BEiT and Swin.
_VIT = {f"attention.{part}_proj": part for part in "qkvo"} | {"mlp.fc1": "fc1", "mlp.fc2": "fc2"}
#: Names in transformers for BERT and its relatives. Before version 5, the models above have them too (with
#: `attention.attention`, except in Swin).
_BERT = {
    f"attention.{inner}.{name}": name[0] for inner in ("self", "attention") for name in ("query", "key", "value")
} | {"attention.output.dense": "o", "intermediate.dense": "fc1", "output.dense": "fc2"}
#: Names in transformers for the gated MLPs of LLaMA, its relatives, DINOv2 and DINOv3, and for the attention of LLaMA
#: and CLIP.
_LLAMA = {"mlp.up_proj": "fc1", "mlp.gate_proj": "gate", "mlp.down_proj": "fc2"}
_LLAMA |= {f"self_attn.{part}_proj": part for part in "qkvo"} | {"self_attn.out_proj": "o"}

#: Architectures whose weights are grouped exactly as in the paper. Each entry holds the pattern of a block's name (with
#: the stage, if widths change between stages) and the roles of the layers in the block. Other architectures need no
#: entry, because their tensor trains are derived from the structure of the model (:mod:`efft.planning.structure`).
FAMILIES: tuple[tuple[str, dict[str, str]], ...] = (
    # Swin and other staged ViTs
    (r"(?:layers|stages)\.(?P<stage>\d+)\.blocks\.\d+", _TIMM | _VIT | _BERT),
    # timm ViT, DeiT, DINOv2
    (r"blocks\.\d+", _TIMM),
    # transformers
    (r"layers?\.\d+", _VIT | _BERT | _LLAMA),
)


@dataclass(frozen=True)
class Target:
    """A weight to adapt.

    Attributes:
        weight: the weight and its place in the model.
        role: role of the weight in its block ("qkv", "fc2", ...), or "linear" if only the shape of the weight matters.
        block, stage: name of the block, and the stage of the block if widths change between stages.
        part: "mhsa" for attention, "ffn" for the MLP, or None if the part is unknown.
    """

    weight: Weight
    role: str = "linear"
    block: str = ""
    stage: int | None = None
    part: str | None = None

    @property
    def name(self) -> str:
        """Name of the weight."""
        return self.weight.name


def find_targets(
    model: nn.Module,
    head: Iterable[str],
    targets: str | Sequence[str] = "all",
    exclude: Sequence[str] = (),
    kinds: Collection[str] = KINDS,
) -> list[Target]:
    """Return the selected weights of ``model`` in the model's order, excluding weights inside the ``head`` modules.

    Args:
        model: any module; it may be on the meta device.
        head: names of the modules that are trained completely.
        targets: one of :data:`TARGETS`, or patterns of names (:func:`efft.planning.names.matcher`).
        exclude: patterns of names to leave out.
        kinds: the kinds of weights that can be adapted (:attr:`efft.planning.structure.Weight.kind`).

    Raises:
        ValueError: a pattern matches nothing, no weight is left, or a matching weight cannot be adapted. The message
            lists the layers of the model.
    """
    return select(model, structure_of(model, head), targets, exclude, kinds)


def select(
    model: nn.Module,
    structure: Structure,
    targets: str | Sequence[str],
    exclude: Sequence[str],
    kinds: Collection[str],
) -> list[Target]:
    """Select weights as :func:`find_targets` does, from a structure that is already known."""
    if isinstance(targets, str):
        chosen = _by_keyword(model, structure, targets, kinds)
    else:
        chosen = _by_name(model, structure, targets, exclude, kinds)
    for pattern in exclude:
        excluded = set(filter(matcher(pattern), {**structure.weights, **structure.reasons, **structure.tied}))
        excluded |= {structure.tied[name] for name in excluded & structure.tied.keys()}
        if not excluded:
            raise ValueError(f"exclude: {pattern!r} matches no linear layer. {_present(structure)}")
        chosen = [target for target in chosen if target.name not in excluded]
    if not chosen:
        raise ValueError(
            f"targets={targets!r}{f' without exclude={exclude!r}' if exclude else ''} leaves no layer. "
            f"{_present(structure)}"
        )
    return chosen


def known_target(weight: Weight) -> Target:
    """Return the weight with the role for its name in :data:`FAMILIES`, or with the role "linear"."""
    for block, roles in FAMILIES if weight.kind == "linear" else ():
        for ending, role in roles.items():
            if not weight.name.endswith(ending):
                continue
            match = re.fullmatch(rf"((?:.*\.)?{block})\.{re.escape(ending)}", weight.name)
            if match:
                stage = match.groupdict().get("stage")
                number = None if stage is None else int(stage)
                return Target(weight, role, match.group(1), number, _PART_OF[role])
    return Target(weight, block=weight.name)


def _by_keyword(model: nn.Module, structure: Structure, targets: str, kinds: Collection[str]) -> list[Target]:
    """Return the weights that the keyword "all", "all-linear", "mhsa" or "ffn" selects."""
    if not structure.weights:
        why = next((f": {name}, because {reason}" for name, reason in structure.reasons.items()), "")
        raise ValueError(f"targets={targets!r} finds nothing to adapt{why}. {_present(structure)}")
    if targets == "all-linear":
        output = getattr(model, "get_output_embeddings", lambda: None)()
        linear = [w for w in structure.weights.values() if w.view == "linear" and w.kind in {*kinds} - {"embedding"}]
        return [Target(w, block=w.name) for w in linear if model.get_submodule(w.module) is not output]
    weights = {n: w for n, w in structure.in_blocks.items() if w.kind in kinds}
    found = _group_as_published(structure) or by_structure(model, weights)
    if targets == "all":
        return found
    chosen = [target for target in found if target.part == targets]
    if not chosen:
        raise ValueError(
            f"targets={targets!r} finds no weight of this {type(model).__name__} that is known to be in "
            f"{'an attention' if targets == 'mhsa' else 'an MLP'}; name the layers: targets=[...]. "
            f"{_present(structure)}"
        )
    return chosen


def _group_as_published(structure: Structure) -> list[Target]:
    """Return the weights in blocks with their roles in a ViT, a Swin or a related model.

    The result is empty if the model is of another kind: if a block has a weight without a role, an incomplete attention
    or sizes that differ from those in the paper. As in the paper, the weights between blocks (the downsampling of a
    Swin) are not adapted.
    """
    targets = [known_target(weight) for weight in structure.in_blocks.values()]
    roles: dict[str, set[str]] = {}
    for target in targets:
        if target.role != "linear":
            roles.setdefault(target.block, set()).add(target.role)
    for target in targets:
        within = target.weight.block or ""
        if target.role == "linear" and not any(block.startswith(within + ".") for block in roles):
            return []
    known = [target for target in targets if target.role != "linear"]
    complete = all({"qkv", "o"} <= own or {"q", "k", "v", "o"} <= own for own in roles.values())
    return known if roles and complete and _are_published_shapes(known) else []


def _are_published_shapes(targets: list[Target]) -> bool:
    """Return whether the attention is square, fc2 has the shape of fc1ᵀ, and sizes are equal within each stage."""
    shapes: dict[tuple[int | None, str], set[tuple[int, int]]] = {}
    for target in targets:
        shapes.setdefault((target.stage, target.role), set()).add((target.weight.d_in, target.weight.d_out))
    if any(len(own) > 1 for own in shapes.values()):
        return False
    for (stage, role), own in shapes.items():
        (shape,) = own
        d = next(iter(shapes[stage, "o"]))[0]
        hidden = next(iter(shapes.get((stage, "fc2"), {(0, d)})))[0]
        fits = {
            "qkv": shape == (d, 3 * d),
            "q": shape == (d, d),
            "k": shape[0] == d and shape[1] <= d,
            "v": shape[0] == d and shape[1] <= d,
            "o": shape == (d, d),
            "fc2": shape == (hidden, d),
        }
        if not fits.get(role, hidden > 0 and shape[0] == d and shape[1] % hidden == 0):
            return False
    return True


def by_structure(model: nn.Module, weights: Mapping[str, Weight]) -> list[Target]:
    """Return the weights with the block and the part of each weight, without using the names of the weights."""
    parts = parts_of(model, weights)
    return [Target(weight, block=weight.block or name, part=parts.get(name)) for name, weight in weights.items()]


def _by_name(
    model: nn.Module, structure: Structure, targets: Sequence[str], exclude: Sequence[str], kinds: Collection[str]
) -> list[Target]:
    """Return the weights that the patterns match.

    A pattern selects linear layers. If it matches no linear layer, it selects other weights.
    """
    everything = {**structure.weights, **structure.reasons}
    linears = {n: w for n, w in structure.weights.items() if w.kind in {"linear", "attention"} & {*kinds}}
    excluding = [matcher(pattern) for pattern in exclude]
    wanted: set[str] = set()
    for pattern in targets:
        matches = matcher(pattern)
        tied = [first for name, first in structure.tied.items() if matches(name)]
        named = [*filter(matches, linears), *tied] or [
            n for n, w in structure.weights.items() if w.kind in kinds and (matches(n) or matches(w.module))
        ]
        for name in structure.reasons:
            if not matches(name) and not matches(name.rpartition(".")[0]):
                continue
            if (not named or _is_layer(model, name)) and not any(excludes(name) for excludes in excluding):
                raise ValueError(f"layer {name!r} cannot be adapted: {structure.reasons[name]}")
        if not named:
            near = nearest(pattern, _endings(everything))
            raise ValueError(
                f"targets: {pattern!r} matches no linear layer of this {type(model).__name__}"
                + (f"; nearest: {', '.join(near)}" if near else "")
                + f". {_present(structure)}"
            )
        wanted.update(named)
    return [known_target(weight) for name, weight in structure.weights.items() if name in wanted]


def _is_layer(model: nn.Module, name: str) -> bool:
    """Return whether a name belongs to a linear layer. A pattern must not skip a linear layer that it matches."""
    parent, _, last = name.rpartition(".")
    return isinstance(model.get_submodule(parent)._modules.get(last), nn.Linear)


def _endings(names: Iterable[str]) -> list[str]:
    """Return the names and all their endings, as candidates for suggestions."""
    parts = [name.split(".") for name in names]
    return sorted({".".join(p[i:]) for p in parts for i in range(len(p))})


def _present(structure: Structure) -> str:
    layers = ("linear", "attention")
    linears = [name for name, weight in structure.weights.items() if weight.kind in layers]
    others = [name for name, weight in structure.weights.items() if weight.kind not in layers]
    listed = f"Linear layers present: {_list(linears)}"
    return listed if linears or not others else f"{listed}. Other weights present: {_list(others)}"


def _list(layers: Iterable[str]) -> str:
    names = list(layers)
    more = f", ... ({len(names)} in all)" if len(names) > 12 else ""
    return f"{', '.join(map(repr, names[:12])) or 'none'}{more}"
