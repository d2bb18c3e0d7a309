"""Which linear layers to adapt, and the role each plays in its block."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from efft.config import EfftConfig
from efft_kernels.nn.linear import cannot_wrap

MHSA_ROLES = ("qkv", "q", "k", "v", "o")
FFN_ROLES = ("fc1", "fc2")

#: Known architectures: the pattern of a block's name (with its stage, where widths change) and the roles in the block.
#: To support another family, add a row here and a test.
FAMILIES: tuple[tuple[str, dict[str, str]], ...] = (
    # timm Swin and other staged ViTs
    (
        r"(?:layers|stages)\.(?P<stage>\d+)\.blocks\.\d+",
        {"attn.qkv": "qkv", "attn.proj": "o", "mlp.fc1": "fc1", "mlp.fc2": "fc2"},
    ),
    # timm ViT, DeiT, DINOv2
    (r"blocks\.\d+", {"attn.qkv": "qkv", "attn.proj": "o", "mlp.fc1": "fc1", "mlp.fc2": "fc2"}),
)


@dataclass(frozen=True)
class Target:
    """A linear layer to adapt: its module name, its role ("linear" outside the tables), its block and its stage."""

    name: str
    role: str
    block: str
    stage: int | None


def find_targets(model: nn.Module, config: EfftConfig, head: list[str]) -> list[Target]:
    """The layers that ``config`` selects, in the model's order; never one inside the ``head`` modules.

    Raises:
        ValueError: nothing matches (a pattern, or at all), or a match cannot be adapted; it lists what is there.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(name == h or name.startswith(h + ".") for h in head)
    }
    if isinstance(config.targets, str):
        roles = {"all": MHSA_ROLES + FFN_ROLES, "mhsa": MHSA_ROLES, "ffn": FFN_ROLES}[config.targets]
        chosen = [t for t in map(_classify, linears) if t.role in roles]
        if not chosen:
            raise ValueError(
                f"targets={config.targets!r} needs a known architecture (timm ViT, DeiT, DINOv2, Swin), and no layer "
                f"of this "
                f"{type(model).__name__} is named like one; name the layers: EfftConfig(targets=[...]). "
                f"{_present(linears)}"
            )
    else:
        for pattern in config.targets:
            if not any(_matches(pattern, name) for name in linears):
                near = difflib.get_close_matches(pattern, _endings(linears), 3, 0.5)
                raise ValueError(
                    f"targets: {pattern!r} matches no linear layer of this {type(model).__name__}"
                    + (f"; nearest: {', '.join(near)}" if near else "")
                    + f". {_present(linears)}"
                )
        chosen = [_classify(n) for n in linears if any(_matches(p, n) for p in config.targets)]
    for pattern in config.exclude:
        if not any(_matches(pattern, name) for name in linears):
            raise ValueError(f"exclude: {pattern!r} matches no linear layer. {_present(linears)}")
    chosen = [t for t in chosen if not any(_matches(p, t.name) for p in config.exclude)]
    if not chosen:
        raise ValueError(
            f"targets={config.targets!r} without exclude={config.exclude!r} leaves no layer. {_present(linears)}"
        )
    for target in chosen:
        reason = cannot_wrap(linears[target.name]) or _bypassed(model, target)
        if reason is not None:
            raise ValueError(f"layer {target.name!r} cannot be adapted: {reason}")
    return chosen


def find_head(model: nn.Module, config_head: list[str] | None) -> list[str]:
    """Names of the modules trained beside the factors: those given, else the classifier (an empty list if there is
    none).

    Raises:
        ValueError: a given name is no module of the model.
    """
    names = [name for name, _ in model.named_modules() if name]
    if config_head is not None:
        for name in config_head:
            if name not in names:
                near = difflib.get_close_matches(name, names, 3)
                raise ValueError(f"head: no module named {name!r}; nearest: {', '.join(near) or 'none'}")
        return list(config_head)
    found: list[nn.Module] = []
    if hasattr(model, "get_classifier"):  # timm; distilled models return a pair
        classifier: Any = cast(Any, model).get_classifier()
        found = list(classifier) if isinstance(classifier, tuple) else [classifier]
    else:
        for attribute in ("classifier", "head", "fc", "score"):
            module = getattr(model, attribute, None)
            if isinstance(module, nn.Module):
                found = [module]
                break
    return [
        name
        for name, module in model.named_modules()
        if name and any(module is m for m in found) and next(module.parameters(), None) is not None
    ]


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


def _matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` is the name, its last components, or a regular expression for all of it."""
    if name == pattern or name.endswith("." + pattern):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ValueError(f"{pattern!r} is neither a layer name nor a regular expression: {error}") from None


def _endings(linears: dict[str, nn.Linear]) -> list[str]:
    """Full names and their endings, for near misses."""
    parts = [name.split(".") for name in linears]
    return sorted({".".join(p[i:]) for p in parts for i in range(len(p))})


def _present(linears: dict[str, nn.Linear]) -> str:
    names = list(linears)
    more = f", ... ({len(names)} in all)" if len(names) > 12 else ""
    return f"Linear layers present: {', '.join(names[:12]) or 'none'}{more}"
