"""Which layers to adapt, and the role each plays in its block."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from efft.config import AdapterConfig
from efft.heads import find_head as find_head  # its place before
from efft.patterns import matcher
from efft_kernels import EfftLinear
from efft_kernels.nn.frozen import cannot_wrap

MHSA_ROLES = ("qkv", "q", "k", "v", "o")
FFN_ROLES = ("fc1", "gate", "fc2")  # a gated MLP has fc1 and gate side by side, or both in one fc1
_ROLES_OF = {"mhsa": MHSA_ROLES, "ffn": FFN_ROLES, "all": MHSA_ROLES + FFN_ROLES}

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

#: Known architectures: the pattern of a block's name (with its stage, where widths change) and the roles in the block.
#: To support another family, add a row here and a test.
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
    """A layer to adapt: its module name, its role ("linear" outside the tables), its block and its stage."""

    name: str
    role: str
    block: str
    stage: int | None


def find_targets(model: nn.Module, config: AdapterConfig, head: list[str]) -> list[Target]:
    """The layers that ``config`` selects, in the model's order; never one inside the ``head`` modules.

    Raises:
        ValueError: nothing matches (a pattern, or at all), or a match cannot be adapted; it lists what is there.
    """
    outside = {
        name: module
        for name, module in model.named_modules()
        if not any(name == h or name.startswith(h + ".") for h in head)
    }
    linears = {name: module for name, module in outside.items() if isinstance(module, nn.Linear)}
    convolutions = {name: module for name, module in outside.items() if isinstance(module, nn.Conv2d)}
    layers: dict[str, nn.Module] = dict(linears)
    if isinstance(config.targets, str):
        chosen = _chosen_by_role(type(model).__name__, config.targets, linears, type(config).__name__)
    else:
        wanted: set[str] = set()
        for pattern in config.targets:
            matches = matcher(pattern)
            named = list(filter(matches, linears))
            if not named and config.layer is EfftLinear:  # what names no linear layer may name convolutions
                named = list(filter(matches, convolutions))
                layers.update({name: convolutions[name] for name in named})
            if not named:
                near = difflib.get_close_matches(pattern, _endings([*linears, *convolutions]), 3, 0.5)
                raise ValueError(
                    f"targets: {pattern!r} matches no linear layer of this {type(model).__name__}"
                    + (f"; nearest: {', '.join(near)}" if near else "")
                    + f". {_present(linears)}"
                    + (f". Convolutions present: {_listed(convolutions)}" if convolutions and not linears else "")
                )
            wanted.update(named)
        chosen = [_classify(name) for name in layers if name in wanted]
    for pattern in config.exclude:
        excluded = set(filter(matcher(pattern), layers))
        if not excluded:
            raise ValueError(f"exclude: {pattern!r} matches no linear layer. {_present(linears)}")
        chosen = [target for target in chosen if target.name not in excluded]
    if not chosen:
        raise ValueError(
            f"targets={config.targets!r} without exclude={config.exclude!r} leaves no layer. {_present(linears)}"
        )
    for target in chosen:
        linear = layers[target.name]
        kind = nn.Conv2d if isinstance(linear, nn.Conv2d) else nn.Linear
        reason = cannot_wrap(linear, kind) or _bypassed(model, target) or _tied(model, linear)
        if reason is not None:
            raise ValueError(f"layer {target.name!r} cannot be adapted: {reason}")
    return chosen


def _chosen_by_role(model: str, targets: str, linears: dict[str, nn.Linear], config: str) -> list[Target]:
    """The layers that play the roles of ``targets`` ("all", "mhsa" or "ffn") in the blocks of a known architecture.

    Raises:
        ValueError: there is none, or a block has other layers where some of these should be.
    """
    classified = [_classify(name) for name in linears]
    chosen = [t for t in classified if t.role in _ROLES_OF[targets]]
    if not chosen:
        raise ValueError(
            f"targets={targets!r} needs a known architecture (of timm: ViT, DeiT, DINOv2, Swin; of transformers: "
            f"these, BEiT, CLIP, BERT, LLaMA and their like), and no layer of this {model} is named like one; name the "
            f"layers: {config}(targets=[...]). {_present(linears)}"
        )
    blocks: dict[str, set[str]] = {}
    for target in chosen:
        blocks.setdefault(target.block, set()).add(target.role)
    kinds = ("mhsa", "ffn") if targets == "all" else (targets,)
    for block, roles in blocks.items():
        others = [t.name for t in classified if t.role == "linear" and t.name.startswith(block + ".")]
        incomplete = [kind for kind in kinds if not any(form <= roles for form in _COMPLETE[kind])]
        if incomplete and others:
            raise ValueError(
                f"targets={targets!r} knows {', '.join(sorted(roles))} of {block} in this {model}, but not which of "
                f"{', '.join(others)} complete its {' and '.join(incomplete)}; name the layers: "
                f"{config}(targets=[...])"
            )
    known = dict.fromkeys(t.block for t in classified if t.role != "linear")
    strange = [t.name for t in classified if t.role == "linear" and _in_another_block(t.name, known)]
    if strange:
        raise ValueError(
            f"targets={targets!r} knows the layers of {next(iter(known))}, ... in this {model}, but not those of other "
            f"blocks: {', '.join(strange[:4])}, ... ({len(strange)} in all); name the layers: {config}(targets=[...])"
        )
    return chosen


def _in_another_block(name: str, known: Iterable[str]) -> bool:
    """Whether a layer lies in one of several like blocks (blocks.3, layers.0, ...) that has no known block in or
    around it."""
    match = re.match(r"((?:.*\.)?(?:\w*blocks\w*|layers?)\.\d+)\.", name)
    return match is not None and not any(
        block.startswith(match[1] + ".") or name.startswith(block + ".") for block in known
    )


#: Roles that make a block's attention or MLP whole.
_COMPLETE: dict[str, tuple[set[str], ...]] = {"mhsa": ({"qkv", "o"}, {"q", "k", "v", "o"}), "ffn": ({"fc1", "fc2"},)}


def _tied(model: nn.Module, linear: nn.Module) -> str | None:
    """Why merging would change more than this layer: its weight is some other module's too."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    owners = [
        name
        for name, module in model.named_modules()
        for p in module._parameters.values()
        if p is weight or (p is not None and not p.is_meta and p.data_ptr() == weight.data_ptr() != 0)
    ]
    if len(owners) == 1:
        return None
    return (
        f"its weight is tied: {' and '.join(owners)} have the same one; leave the layer out (exclude=[...]), or give "
        "it its own: layer.weight = nn.Parameter(layer.weight.detach().clone())"
    )


def _bypassed(model: nn.Module, target: Target) -> str | None:
    """Why the layer's own forward would not run: timm's BEiT and Swin v2 add separate q and v biases by hand."""
    parent = model.get_submodule(target.name.rpartition(".")[0])
    if target.role != "qkv" or getattr(parent, "q_bias", None) is None or getattr(parent, "qkv_bias_separate", False):
        return None
    return (
        f"{type(parent).__name__} reads its weight and never calls the layer, so the update would be ignored; "
        "leave it out with exclude=['attn.qkv']"
    )


def _classify(name: str) -> Target:
    for block, roles in FAMILIES:
        for ending, role in roles.items():
            match = re.fullmatch(rf"((?:.*\.)?{block})\.{re.escape(ending)}", name)
            if match:
                stage = match.groupdict().get("stage")
                return Target(name, role, match.group(1), None if stage is None else int(stage))
    return Target(name, "linear", name, None)


def _endings(names: Iterable[str]) -> list[str]:
    """Full names and their endings, for near misses."""
    parts = [name.split(".") for name in names]
    return sorted({".".join(p[i:]) for p in parts for i in range(len(p))})


def _present(linears: dict[str, nn.Linear]) -> str:
    return f"Linear layers present: {_listed(linears)}"


def _listed(layers: Iterable[str]) -> str:
    names = list(layers)
    more = f", ... ({len(names)} in all)" if len(names) > 12 else ""
    return f"{', '.join(map(repr, names[:12])) or 'none'}{more}"
