"""Export to a LoRA checkpoint of ``peft``, exactly: ``A = Dᵀ`` and ``B = Gᵀ`` of every adapted layer, scaling 1."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn

from efft import buffers
from efft.files import CONFIG, read_json, write_pair
from efft.inject import Bank, adapted_layers, bank_of
from efft.io import head_tensors
from efft.sharding import check_whole
from efft.stored import check_stored
from efft.wrappers import plain_name, unwrap
from efft_kernels.nn.linear import AdaptedLayer
from efft_kernels.nn.parameter import AdaptedParameter

#: What peft puts before the names of the base's modules.
PREFIX = "base_model.model."


@torch.no_grad()
def export_lora(model: nn.Module, folder: str | os.PathLike[str], base_model: str | None = None) -> Path:
    """Write an adapted model's update and head as a LoRA checkpoint, for anything that reads those of ``peft``.

    Nothing is approximated: the update of a layer is ``D G`` of rank r, so ``lora_A [r, in_features]`` is ``Dᵀ`` and
    ``lora_B [out_features, r]`` is ``Gᵀ`` with s inside, both in the factors' dtype; ``lora_alpha = r`` makes peft's
    scaling 1. The file is larger than the adapter's own: LoRA shares nothing between layers.
    ``peft.PeftModel.from_pretrained(base, folder)`` loads it, without this library. Modules whose buffers training
    changed, such as batch norms, are written whole, like the head.

    Args:
        model: adapted by :func:`efft.apply`; may be merged.
        folder: made if needed; a LoRA checkpoint in it is replaced. Killed meanwhile, the folder lacks the
            configuration, and nothing loads.
        base_model: name or path of the base to record; by default what a model of transformers was loaded from.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not adapted, or by a method that updates no weight; it is sharded; ``folder`` holds an
            adapter of another method; a layer computes with another weight than the stored one; or peft would
            understand the names of layers and head differently.
    """
    model = unwrap(model)
    bank, folder = bank_of(model), Path(folder)
    check_whole(model, "export_lora")
    check_stored(adapted_layers(model), "export_lora")
    layers = _exportable(model)
    head = bank.head + _changed_modules(model, bank, layers)
    _check_names(model, layers, head)
    _check_replaceable(folder / CONFIG)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, layer in layers.items():
        D, G = layer.evaluated()  # [in_features, r], [r, out_features]
        ranks[name] = D.shape[1]
        A, B = D.t(), G.t()
        if isinstance(layer, nn.modules.conv._ConvNd):  # peft's are a kernel and one of size 1
            A, B = A.unflatten(1, layer.stored.shape[1:]), B.reshape(*B.shape, *[1] * len(layer.kernel_size))
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B
    tensors.update({f"{PREFIX}{name}": tensor for name, tensor in head_tensors(model, head).items()})
    # A copy each: D is one tensor in all layers, which safetensors refuses.
    content = serialize({n: t.clone(memory_format=torch.contiguous_format).cpu() for n, t in tensors.items()})
    config = _config(ranks, head, base_model or getattr(model, "name_or_path", None))
    write_pair(folder, content, (json.dumps(config, indent=2) + "\n").encode())
    return folder


def _exportable(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The adapted layers; ValueError if a weight is adapted whose update peft's LoRA of a layer cannot express."""
    layers = {}
    for name, update in adapted_layers(model).items():
        grouped = isinstance(update, nn.modules.conv._ConvNd) and update.groups > 1
        if not isinstance(update, AdaptedLayer) or isinstance(update, nn.Embedding) or grouped:
            kind = "a parameter that a module reads" if isinstance(update, AdaptedParameter) else type(update).__name__
            raise ValueError(
                f"{name} is {kind}, for which peft's LoRA has no equal form: merge the update instead "
                "(efft.merged_state_dict), or adapt with targets that leave it out"
            )
        layers[name] = update
    return layers


def _changed_modules(model: nn.Module, bank: Bank, layers: dict[str, AdaptedLayer]) -> list[str]:
    """The modules outside the head with buffers that training changed: peft stores modules, not buffers."""
    changed = buffers.changed(model, bank.head, bank._base_buffers)
    modules = dict.fromkeys(name.rpartition(".")[0] for name in changed)
    for name in modules:
        if not name or any(f"{layer}.".startswith(f"{name}.") for layer in layers):
            raise ValueError(
                f"training changed buffers of {name or 'the model itself'}, which has adapted layers inside, and a "
                "LoRA checkpoint has no place for them; merge the update instead (efft.merged_state_dict)"
            )
    return list(modules)


def _config(ranks: dict[str, int], head: list[str], base_model: str | None) -> dict[str, Any]:
    """peft's ``LoraConfig``; the fields that are not here have their defaults."""
    (usual, _), *_ = Counter(ranks.values()).most_common(1)
    # peft takes the first key that ends a layer's name: longer names go first, those of the usual rank among them.
    longest_first = dict(sorted(ranks.items(), key=lambda item: -len(item[0])))
    others = longest_first if len(set(ranks.values())) > 1 else {}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model or None,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(ranks),
        "modules_to_save": head or None,
    }


def _check_names(model: nn.Module, layers: dict[str, AdaptedLayer], head: list[str]) -> None:
    """peft adapts a layer at one of its places, and trains every module whose name *ends* like one of the head's."""
    names = {module: name for name, module in layers.items()}
    for full, module in model.named_modules(remove_duplicate=False):
        name = plain_name(full)
        if names.get(module, name) != name:
            raise ValueError(
                f"{names[module]} and {name} are one layer, and peft would adapt only the first; merge the update "
                "instead (efft.merged_state_dict)"
            )
        of = next((layer for layer in layers if name.endswith(f".{layer}")), None)
        if of is not None and name not in layers:
            raise ValueError(
                f"peft would adapt {name} too, since its name ends like {of}'s; merge the update instead "
                "(efft.merged_state_dict)"
            )
        ends = [h for h in head if name.endswith(h) and name not in head]
        if ends and any(f"{layer}.".startswith(f"{name}.") for layer in layers):
            raise ValueError(
                f"peft would take {name} for the head {ends[0]!r}, since its name ends so, and not adapt it; merge the "
                "update instead (efft.merged_state_dict)"
            )


def _check_replaceable(path: Path) -> None:
    """Never overwrite the adapter that the checkpoint comes from."""
    try:
        method = read_json(path).get("peft_type", "EFFT") if path.exists() else "LORA"
    except (ValueError, AttributeError):
        method = "unknown"
    if method != "LORA":
        raise ValueError(f"{path.parent} holds an adapter of method {method}, expected an empty folder or one of LORA")
