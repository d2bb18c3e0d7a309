"""Export adapters as LoRA checkpoints of ``peft``. The export is exact.

A layer with the update D G computes ``y = x (Wᵀ + D G)``. In the checkpoint, its LoRA factors are ``A = Dᵀ`` and
``B = Gᵀ`` with a scaling of 1. For parameters that are stored transposed, ``A = G`` and ``B = D`` (except for some
experts, see :func:`_pair_of_parameter`).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn

from efft.adapting import buffers, extras
from efft.adapting.adapter import check_not_aside
from efft.adapting.inject import Adapter, adapted_layers, adapter_of
from efft.adapting.sharding import check_whole
from efft.adapting.wrappers import plain_name, unwrap
from efft.planning.extras import is_norm
from efft.saving.files import CONFIG, read_json, write_pair
from efft.saving.io import head_tensors
from efft.saving.stored import check_stored
from efft_kernels import ExpertWeight
from efft_kernels.nn.adapted import AdaptedWeight
from efft_kernels.nn.experts import EXPERT_VIEWS
from efft_kernels.nn.linear import AdaptedLayer
from efft_kernels.nn.parameter import AdaptedParameter, adapted_weights_of

#: Prefix that peft adds to the names of the base's modules.
PREFIX = "base_model.model."
#: In models with experts as parameters, peft interprets layers with these names as parts of the experts, because they
#: were parts of the experts in earlier versions of the models.
_OF_FORMER_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
#: Maps each value of ``bias`` in our configurations to the value in peft's configuration.
_PEFT_BIAS = {"none": "none", "all": "all", "adapted": "lora_only", "auto": "lora_only"}
_MERGE = "merge the update instead (efft.merged_state_dict)"


@torch.no_grad()
def export_lora(model: nn.Module, folder: str | os.PathLike[str], base_model: str | None = None) -> Path:
    """Write the update and the head of an adapted model as a LoRA checkpoint, for programs that read ``peft`` files.

    The export is exact. The update of a layer is ``D G`` with rank r. ``lora_A [r, in_features]`` is ``Dᵀ``, and
    ``lora_B [out_features, r]`` is ``Gᵀ``, which includes the scale s. Both have the dtype of the factors. peft's
    scaling is 1, because ``lora_alpha`` is r. The file is larger than the file of the adapter, because LoRA shares no
    factors between layers. ``peft.PeftModel.from_pretrained(base, folder)`` loads the checkpoint without this library.

    - Weights that do not belong to a layer, such as the experts of a mixture, are listed in ``target_parameters``.
      Every expert has its own factors there.
    - Modules whose buffers have changed in training (such as batch norms) and trained normalization layers are written
      as a whole, like the head.
    - Trained biases are written in the form in which peft writes them with ``bias="all"`` or ``"lora_only"``. When peft
      loads the checkpoint, it replaces the biases of the base model.

    Args:
        model: adapted by :func:`efft.apply`; it may be merged.
        folder: folder for the checkpoint, which is created if needed. An existing LoRA checkpoint is replaced. If the
            process is killed before it starts to replace files, the old checkpoint remains. If it is killed while it
            replaces files, the folder has no configuration and cannot be loaded.
        base_model: name or path of the base model that the checkpoint records. By default it is the name from which
            transformers loaded the model, if there is one.

    Returns:
        The folder.

    Raises:
        ValueError: the model cannot be exported, or ``folder`` holds an adapter of another method. The message gives
            the reason. A model cannot be exported if

            - it is not adapted, is adapted by a method that does not update weights, or is sharded,
            - a layer computes its weight from other tensors, or the parent of a layer reads the weight itself,
            - it has an adapted grouped convolution, or an adapted parameter that is neither a matrix nor experts,
            - buffers have changed in a module that has adapted layers inside,
            - a trained bias is not called ``bias``, or
            - peft would adapt or train other modules than those of the adapter, because of their names.
        RuntimeError: the model is within a block of :func:`efft.disabled` that has replaced biases, norms or buffers.
    """
    model = unwrap(model)
    adapter, folder = adapter_of(model), Path(folder)
    check_not_aside(adapter, "export_lora")
    check_whole(model, "export_lora")
    check_stored(adapted_layers(model), "export_lora")
    layers = adapted_layers(model)
    whole = _changed_modules(model, adapter, layers)
    biases, norms = _split_extras(model, adapter, whole)
    if biases and adapter.config.extras.bias == "auto":
        # A checkpoint with bias="lora_only" has the biases of all adapted layers, including those that are not trained.
        own = dict(model.named_parameters())
        biases |= {name: own[name].detach() for layer in layers if (name := f"{layer}.bias") in own}
    head = _saved_by_peft(model, list(dict.fromkeys(adapter.head + whole + norms)), layers)
    _check_names(model, layers, head)
    _check_replaceable(folder / CONFIG)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, layer in layers.items():
        D, G = layer.evaluated()
        ranks[name] = D.shape[1]
        tensors.update({f"{PREFIX}{key}": tensor for key, tensor in _pair(name, layer, D, G).items()})
    tensors.update({f"{PREFIX}{name}": tensor for name, tensor in head_tensors(model, head).items()})
    tensors.update({f"{PREFIX}{_name_of_bias(model, name)}": bias for name, bias in biases.items()})
    # The tensors are copied, because layers share D, and safetensors refuses tensors that share memory.
    content = serialize({n: t.clone(memory_format=torch.contiguous_format).cpu() for n, t in tensors.items()})
    parameters = [name for name, layer in layers.items() if isinstance(layer, AdaptedParameter)]
    bias = _PEFT_BIAS[adapter.config.extras.bias] if biases else "none"
    config = _config(ranks, parameters, head, bias, base_model or getattr(model, "name_or_path", None))
    write_pair(folder, content, (json.dumps(config, indent=2) + "\n").encode())
    return folder


def _changed_modules(model: nn.Module, adapter: Adapter, layers: Mapping[str, AdaptedWeight]) -> list[str]:
    """Return the modules outside the head whose buffers have changed. peft can only store buffers with their module."""
    changed = buffers.changed(model, adapter.head, adapter._base_buffers)
    modules = dict.fromkeys(name.rpartition(".")[0] for name in changed)
    for name in modules:
        if not name or any(f"{layer}.".startswith(f"{name}.") for layer in layers):
            raise ValueError(
                f"training changed buffers of {repr(name) if name else 'the model itself'}, which has adapted layers "
                f"inside, and a LoRA checkpoint cannot store such buffers; {_MERGE}"
            )
    return list(modules)


def _split_extras(model: nn.Module, adapter: Adapter, whole: list[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the trained biases by name, and the names of the normalization layers to store as a whole."""
    trained = extras.parameters_of(model, adapter.extras)
    others = [name for name in trained if name.rpartition(".")[2] != "bias"]
    norms = list(dict.fromkeys(name.rpartition(".")[0] for name in others))
    for name in others:
        if not is_norm(model.get_submodule(name.rpartition(".")[0])):
            raise ValueError(
                f"{name!r} was trained, and peft knows only biases of the name 'bias'; {_MERGE}, or train with "
                "bias='none'"
            )
    apart = {*norms, *whole}
    return {name: bias for name, bias in trained.items() if name.rpartition(".")[0] not in apart}, norms


def _name_of_bias(model: nn.Module, name: str) -> str:
    """Return the name that a bias has after peft has wrapped the module that owns the bias."""
    owner = name.rpartition(".")[0]
    depth = len(adapted_weights_of(model.get_submodule(owner)))
    return ".".join([owner, *["base_layer"] * depth, "bias"])


def _saved_by_peft(model: nn.Module, head: list[str], layers: Mapping[str, AdaptedWeight]) -> list[str]:
    """Return the modules to store as peft's ``modules_to_save``.

    A list of modules is replaced by its members. If the name of a module ends with the name of a saved module, peft
    treats that module as saved too, and would miss its tensors in the file. Such modules are therefore added.
    """
    names: list[str] = []
    for name in head:
        module = model.get_submodule(name)
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            names += _saved_by_peft(model, [f"{name}.{child}" for child in module._modules], {})
        else:
            names.append(name)
    for name in map(plain_name, dict(model.named_modules()) if layers else ()):
        inside = any(f"{other}.".startswith(f"{name}.") for other in layers)  # _check_names raises an error for these
        if not inside and name.endswith(tuple(names)) and not any(f"{name}.".startswith(f"{n}.") for n in names):
            names.append(name)
    return names


def _pair(name: str, layer: AdaptedWeight, D: Tensor, G: Tensor) -> dict[str, Tensor]:
    """Return peft's tensors ``lora_A`` and ``lora_B`` of the layer ``name``, by their names in the checkpoint.

    D is [in_features, r], and G is [r, out_features].
    """
    if isinstance(layer, AdaptedParameter):
        return _pair_of_parameter(name, layer, D, G)
    A, B = D.t(), G.t()
    if isinstance(layer, nn.Embedding):
        return {f"{name}.lora_embedding_A": A, f"{name}.lora_embedding_B": B}
    if isinstance(layer, nn.modules.conv._ConvNd):  # peft's A is a kernel of the layer's size, and B is a 1 x 1 kernel
        if layer.groups > 1:
            raise ValueError(f"{name!r} is a grouped convolution, for which peft has no such update; {_MERGE}")
        A, B = A.unflatten(1, layer.weight.shape[1:]), B[(..., *[None] * (layer.weight.dim() - 2))]
    return {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}


def _pair_of_parameter(name: str, layer: AdaptedParameter, D: Tensor, G: Tensor) -> dict[str, Tensor]:
    """Return ``lora_A`` and ``lora_B`` of a parameter that peft lists in ``target_parameters``.

    A acts on the last dimension of the parameter. If the module of experts sets ``is_transposed``, A acts on the second
    to last dimension instead.
    """
    owner, _, parameter = name.rpartition(".")
    turned = layer.view in ("transposed", EXPERT_VIEWS[True])
    if isinstance(layer, ExpertWeight):  # peft has separate factors for each expert, so A is repeated
        inside, outside = D.t().expand(len(G), -1, -1), G.transpose(1, 2)  # [experts, r, d_in], [experts, d_out, r]
        if turned and not getattr(layer.module, "is_transposed", False):
            inside, outside = outside.transpose(1, 2), inside.transpose(1, 2)
        A, B = inside.flatten(0, 1), outside.permute(1, 2, 0).flatten(1)
    elif layer.stored.dim() == 2:
        A, B = (G, D) if turned else (D.t(), G.t())
    else:
        raise ValueError(
            f"{name!r} has {layer.stored.dim()} dimensions, and peft can adapt only matrices and experts; {_MERGE}"
        )
    # peft nests its wrappers. The wrapper of the module's first parameter is the innermost one.
    adapted = cast(Any, layer.module).adapted_parameters
    order = [n for n in layer.module._parameters if n in adapted]
    depth = len(order) - 1 - order.index(parameter)
    key = ".".join([owner, *["base_layer"] * depth])
    return {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}


def _config(
    ranks: dict[str, int], parameters: list[str], head: list[str], bias: str, base_model: str | None
) -> dict[str, Any]:
    """Return the settings of peft's ``LoraConfig``, without the fields that keep their defaults."""
    (usual, _), *_ = Counter(ranks.values()).most_common(1)
    # peft uses the first key with which the name of a layer ends. Longer names must therefore come first, and names of
    # layers with the usual rank must not be left out.
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
        "bias": bias,
        "target_modules": [name for name in ranks if name not in parameters],
        **({"target_parameters": parameters} if parameters else {}),
        "modules_to_save": head or None,
    }


def _check_names(model: nn.Module, layers: Mapping[str, AdaptedWeight], head: list[str]) -> None:
    """Raise ValueError if peft would adapt or train other modules than the adapter does.

    peft adapts a shared layer only once. It trains a module if the name of the module *ends* with the name of a head
    module.
    """
    names: dict[Any, str] = {}
    for name, layer in layers.items():
        if isinstance(layer, AdaptedParameter):
            names[layer.module] = name.rpartition(".")[0]
        else:
            names[layer] = name
    for name, layer in layers.items():
        if isinstance(layer, AdaptedLayer) and layer.read:
            raise ValueError(
                f"the module around {name!r} reads its weight, and would miss an update in a layer of peft; {_MERGE}"
            )
        if not isinstance(layer, AdaptedParameter):
            continue
        inside = [other for other in layers if other.startswith(f"{names[layer.module]}.") and other in names.values()]
        if isinstance(layer.module, nn.MultiheadAttention) or inside:
            raise ValueError(
                f"{name!r} is a parameter of a {type(layer.module).__name__}, which peft does not wrap, because it "
                f"{f'contains the adapted layer {inside[0]!r}' if inside else 'reads its own weights'}; {_MERGE}"
            )
    experts = [n for n, module in model.named_modules() if "gate_up_proj" in module._parameters]
    former = [n for n in layers if experts and n.rpartition(".")[2] in _OF_FORMER_EXPERTS and n in names.values()]
    if former:
        raise ValueError(
            f"peft would not adapt {former[0]!r}, because it would treat the layer as a part of {experts[0]!r}, where "
            f"transformers 4 had layers of that name; {_MERGE}"
        )
    parameters = [name for name, layer in layers.items() if isinstance(layer, AdaptedParameter)]
    for name in map(plain_name, dict(model.named_parameters()) if parameters else ()):
        of = next((parameter for parameter in parameters if name.endswith(f".{parameter}")), None)
        if of is not None:
            raise ValueError(f"peft would adapt {name!r} too, because its name ends with {of!r}; {_MERGE}")
    for full, module in model.named_modules(remove_duplicate=False):
        name = plain_name(full)
        if names.get(module, name) != name:
            raise ValueError(
                f"{names[module]!r} and {name!r} are one layer, and peft would adapt only the first; {_MERGE}"
            )
        of = next((layer for layer in layers if name.endswith(f".{layer}")), None)
        if of is not None and name not in layers:
            raise ValueError(f"peft would adapt {name!r} too, because its name ends with {of!r}; {_MERGE}")
        ends = [h for h in head if name.endswith(h) and name not in head]
        if ends and any(f"{layer}.".startswith(f"{name}.") for layer in layers):
            raise ValueError(
                f"peft would not adapt {name!r}, but treat it as the head {ends[0]!r}, because the name of the layer "
                f"ends with the name of the head; {_MERGE}"
            )


def _check_replaceable(path: Path) -> None:
    """Raise ValueError if ``path`` is the configuration of an adapter of another method than LoRA."""
    try:
        method = read_json(path).get("peft_type", "EFFT") if path.exists() else "LORA"
    except (ValueError, AttributeError):
        method = "unknown"
    if method != "LORA":
        raise ValueError(
            f"'{path.parent}' holds an adapter of method {method!r}, expected an empty folder or a LoRA checkpoint"
        )
