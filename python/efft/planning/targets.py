"""Which weights to adapt, and the part each plays in its block."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from efft.adapting.heads import find_head
from efft.config import AdapterConfig
from efft.patterns import matcher
from efft.planning.structure import Structure, Weight, parts_of, structure_of

__all__ = ["FFN_ROLES", "MHSA_ROLES", "Target", "find_head", "find_targets", "select"]

MHSA_ROLES = ("qkv", "q", "k", "v", "o")
FFN_ROLES = ("fc1", "gate", "fc2")  # a gated MLP has fc1 and gate side by side, or both in one fc1
_PART_OF = dict.fromkeys(MHSA_ROLES, "mhsa") | dict.fromkeys(FFN_ROLES, "ffn")

_TIMM = {"attn.qkv": "qkv", "attn.proj": "o", "mlp.fc1": "fc1", "mlp.fc2": "fc2"}
#: transformers 5: ViT, DeiT, DINOv2, BEiT, Swin.
_VIT = {f"attention.{part}_proj": part for part in "qkvo"} | {"mlp.fc1": "fc1", "mlp.fc2": "fc2"}
#: transformers: BERT and its like; before version 5 the above, too (`attention.attention` in all but Swin).
_BERT = {
    f"attention.{inner}.{name}": name[0] for inner in ("self", "attention") for name in ("query", "key", "value")
} | {"attention.output.dense": "o", "intermediate.dense": "fc1", "output.dense": "fc2"}
#: transformers: gated MLPs of LLaMA and its like, DINOv2 and DINOv3; LLaMA's and CLIP's attention.
_LLAMA = {"mlp.up_proj": "fc1", "mlp.gate_proj": "gate", "mlp.down_proj": "fc2"}
_LLAMA |= {f"self_attn.{part}_proj": part for part in "qkvo"} | {"self_attn.out_proj": "o"}

#: Architectures whose weights are grouped exactly as the paper groups them, whatever their shapes: the pattern of a
#: block's name (with its stage, where widths change) and the roles in the block. Others need no row here: their trains
#: follow from the structure (:mod:`efft.planning.structure`).
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
        weight: what it is and where.
        role: what it does in its block ("qkv", "fc2", ...); "linear" where only its shape counts.
        block, stage: the block of a role, and the stage where widths change.
        part: "mhsa", "ffn", or None where neither can be told.
    """

    weight: Weight
    role: str = "linear"
    block: str = ""
    stage: int | None = None
    part: str | None = None

    @property
    def name(self) -> str:
        """The weight's name."""
        return self.weight.name


def find_targets(model: nn.Module, config: AdapterConfig, head: list[str]) -> list[Target]:
    """The weights that ``config`` selects, in the model's order; never one inside the ``head`` modules.

    Raises:
        ValueError: a pattern matches nothing, no weight is left, or a match cannot be adapted; it lists what is there.
    """
    return select(model, structure_of(model, head), config)


def select(model: nn.Module, structure: Structure, config: AdapterConfig) -> list[Target]:
    """:func:`find_targets` in a structure that is known already."""
    if isinstance(config.targets, str):
        chosen = _by_keyword(model, structure, config)
    else:
        chosen = _by_name(model, structure, config)
    for pattern in config.exclude:
        excluded = set(filter(matcher(pattern), {**structure.weights, **structure.reasons, **structure.tied}))
        excluded |= {structure.tied[name] for name in excluded & structure.tied.keys()}
        if not excluded:
            raise ValueError(f"exclude: {pattern!r} matches no linear layer. {_present(structure)}")
        chosen = [target for target in chosen if target.name not in excluded]
    if not chosen:
        raise ValueError(
            f"targets={config.targets!r}{f' without exclude={config.exclude!r}' if config.exclude else ''} leaves no "
            f"layer. {_present(structure)}"
        )
    return chosen


def known_target(weight: Weight) -> Target:
    """The weight with the role that the tables know it by, if any."""
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


def _by_keyword(model: nn.Module, structure: Structure, config: AdapterConfig) -> list[Target]:
    """The weights of "all", "all-linear", "mhsa" or "ffn"."""
    if not structure.weights:
        why = next((f": {name}, because {reason}" for name, reason in structure.reasons.items()), "")
        raise ValueError(f"targets={config.targets!r} finds nothing to adapt{why}. {_present(structure)}")
    if config.targets == "all-linear":
        output = getattr(model, "get_output_embeddings", lambda: None)()
        linear = [
            w for w in structure.weights.values() if w.view == "linear" and w.kind in config.kinds - {"embedding"}
        ]
        return [Target(w, block=w.name) for w in linear if model.get_submodule(w.module) is not output]
    weights = {n: w for n, w in structure.in_blocks.items() if w.kind in config.kinds}
    targets = _grouped_as_published(structure) or by_structure(model, weights)
    if config.targets == "all":
        return targets
    chosen = [target for target in targets if target.part == config.targets]
    if not chosen:
        raise ValueError(
            f"targets={config.targets!r} finds no weight of this {type(model).__name__} that can be told to be in "
            f"{'an attention' if config.targets == 'mhsa' else 'an MLP'}; name the layers: "
            f"{type(config).__name__}(targets=[...]). {_present(structure)}"
        )
    return chosen


def _grouped_as_published(structure: Structure) -> list[Target]:
    """The weights with their roles in a ViT, a Swin or their like; none if a block has a weight without a role.

    What lies between blocks (the downsampling of a Swin) is left alone, as in the paper.
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
    """Whether the attention is square and the MLP goes out and back, with the same sizes throughout a stage."""
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
    """The weights with the block and the part of it that each is found in, whatever their names."""
    parts = parts_of(model, weights)
    return [Target(weight, block=weight.block or name, part=parts.get(name)) for name, weight in weights.items()]


def _by_name(model: nn.Module, structure: Structure, config: AdapterConfig) -> list[Target]:
    """The weights that the patterns name: linear layers, or where a pattern names none of them, others."""
    everything = {**structure.weights, **structure.reasons}
    linears = {n: w for n, w in structure.weights.items() if w.kind in {"linear", "attention"} & config.kinds}
    wanted: set[str] = set()
    for pattern in config.targets:
        matches = matcher(pattern)
        tied = [first for name, first in structure.tied.items() if matches(name)]
        named = [*filter(matches, linears), *tied] or [
            n for n, w in structure.weights.items() if w.kind in config.kinds and (matches(n) or matches(w.module))
        ]
        for name in structure.reasons:
            if not matches(name) and not matches(name.rpartition(".")[0]):
                continue
            if (not named or _is_layer(model, name)) and not any(matcher(pattern)(name) for pattern in config.exclude):
                raise ValueError(f"layer {name!r} cannot be adapted: {structure.reasons[name]}")
        if not named:
            near = difflib.get_close_matches(pattern, _endings(everything), 3, 0.5)
            raise ValueError(
                f"targets: {pattern!r} matches no linear layer of this {type(model).__name__}"
                + (f"; nearest: {', '.join(near)}" if near else "")
                + f". {_present(structure)}"
            )
        wanted.update(named)
    return [known_target(weight) for name, weight in structure.weights.items() if name in wanted]


def _is_layer(model: nn.Module, name: str) -> bool:
    """Whether a name is that of a linear layer, which a pattern must not pass over."""
    parent, _, last = name.rpartition(".")
    return isinstance(model.get_submodule(parent)._modules.get(last), nn.Linear)


def _endings(names: Iterable[str]) -> list[str]:
    """Full names and their endings, for near misses."""
    parts = [name.split(".") for name in names]
    return sorted({".".join(p[i:]) for p in parts for i in range(len(p))})


def _present(structure: Structure) -> str:
    layers = ("linear", "attention")
    linears = [name for name, weight in structure.weights.items() if weight.kind in layers]
    others = [name for name, weight in structure.weights.items() if weight.kind not in layers]
    listed = f"Linear layers present: {_listed(linears)}"
    return listed if linears or not others else f"{listed}. Other weights present: {_listed(others)}"


def _listed(layers: Iterable[str]) -> str:
    names = list(layers)
    more = f", ... ({len(names)} in all)" if len(names) > 12 else ""
    return f"{', '.join(map(repr, names[:12])) or 'none'}{more}"
