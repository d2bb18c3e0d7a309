"""Adapter files: ``adapter_model.safetensors`` (factors once, and the head), ``adapter_config.json``, a model card."""

from __future__ import annotations

import hashlib
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor, nn

from efft.adapting import buffers
from efft.adapting.inject import Adapter, adapted_layers, adapter_of, apply_plan, check_plain
from efft.adapting.offload import hooks_aside, stored
from efft.adapting.placing import find_update, locate
from efft.adapting.sharding import architecture, check_not_zeros, copy_whole_, full_shape, once, reshard, whole
from efft.adapting.wrappers import check_unwrapped, plain_name, unwrap
from efft.config import FORMAT_VERSION, AdapterConfig
from efft.methods import config_from_dict, config_type
from efft.planning.plan import Plan, check_saved_plan, plan_of_file
from efft.saving import files, fingerprint
from efft.saving.card import model_card
from efft.saving.files import CONFIG, WEIGHTS
from efft_kernels import __version__
from efft_kernels.nn.frozen import can_dequantize, dequantized, is_plain

#: What values of a right type but beyond all sizes, of a wrong type, or nested too deeply make Python and torch raise.
_OUT_OF_BOUNDS = (TypeError, OverflowError, RecursionError)

#: Names of factors, this library's and those of the checkpoints that it imports.
_FACTOR = re.compile(r"efft\.|.*\.lora_[AB]\.|.*FacT")

#: What is recorded about the model that was adapted.
_BASE = {"architecture", "layers", "dtype", "fingerprint"}


def save_adapter(model: nn.Module, path: str | os.PathLike[str], info: dict[str, Any] | None = None) -> Path:
    """Write the trained part of an adapted model (factors once, head, buffers that training changed) to the folder
    ``path``.

    A model sharded by ``fully_shard`` or ZeRO-3 is gathered tensor by tensor: every process must call this, rank 0's
    writes, and none returns before.

    Args:
        model: adapted by :func:`efft.apply`; may be merged, and wrapped by DDP or its like.
        path: folder, made if needed; an earlier adapter in it is replaced as a whole: whenever this is killed, that one
            or the new one loads (:func:`efft.saving.files.write_adapter`).
        info: JSON-ready facts to keep beside the weights (accuracy, command, ...); shown in the model card.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not adapted; ``info`` is too long.
        TypeError: ``info`` is not JSON-ready.
        OSError: no room, no permission. In each case the folder's adapter is the one that was there.
        RuntimeError: in the other processes, where rank 0 could not write.
    """
    model = unwrap(model)
    adapter, folder = adapter_of(model), Path(path)
    reshard(model)
    others = buffers.changed(model, adapter.head, adapter._base_buffers)
    trained = _trained(model, adapter) | others
    tensors = {name: whole(t).detach().contiguous().cpu() for name, t in trained.items()}
    description = {
        "config": adapter.config.to_dict(),
        "base": describe_base(model, adapter.layers),
        "head": adapter.head,
        "plan": adapter.plan,
        "buffers": sorted(others),
        "library": f"efft-kernels {__version__}",
        "info": info or {},
    }
    weights, card = serialize(tensors, {"format_version": str(FORMAT_VERSION)}), model_card(model, description)
    once(model, lambda: files.write_adapter(folder, weights, description, card))
    return folder


def load_adapter(model: nn.Module, path: str | os.PathLike[str], strict: bool = True) -> nn.Module:
    """Load an adapter into ``model``, adapting it first (with the saved configuration) if it is not yet.

    All checks come before any change. With ``strict=False`` missing or unexpected tensors and other base weights are
    only warned about; shapes must always fit.

    Returns:
        The same ``model``.

    Raises:
        FileNotFoundError: no adapter at ``path``.
        ValueError: a damaged file, another configuration, other layers or weights than the adapter was trained on.
    """
    folder = Path(path)
    while not load_described(model, folder, read_description(folder), strict):
        pass
    return model


def load_described(model: nn.Module, folder: Path, description: dict[str, Any], strict: bool) -> bool:
    """:func:`load_adapter` of the adapter that :func:`read_description` told of; False, and no change, if another one
    has been saved there meanwhile."""
    try:
        config = config_from_dict(description["config"])
    except _OUT_OF_BOUNDS as error:
        raise ValueError(f"{folder / CONFIG} is not an EFFT adapter configuration: {error!r}") from None
    if config.head not in (None, description["head"]):
        raise ValueError(
            f"{folder / CONFIG} is not an EFFT adapter configuration: its 'head' {description['head']} is not the one "
            f"in its 'config', {config.head}"
        )
    config.head = description["head"]
    check_not_zeros(model, "load_adapter")
    adapter = getattr(unwrap(model), "efft", None)
    adapted = isinstance(adapter, Adapter)
    if isinstance(adapter, Adapter):
        model = unwrap(model)
        if any(layer.merged for layer in adapted_layers(model).values()):
            raise ValueError("an update is merged into this model's weights; call efft.unmerge(model) before loading")
        _compare_configs(adapter, config, folder)
        layers, shapes = adapter.layers, {name: tuple(t.shape) for name, t in _trained(model, adapter).items()}
    else:
        check_unwrapped(model, "load_adapter")
        try:
            check_plain(model)
            with hooks_aside(model):
                plan = plan_of_file(model, config, description.get("plan", []), description["base"])
            layers, shapes = list(plan.weights), _planned_shapes(model, plan)
        except (ValueError, RuntimeError, *_OUT_OF_BOUNDS) as error:  # RuntimeError: sizes that no storage has
            raise ValueError(f"the adapter in {folder} does not fit this {type(model).__name__}: {error}") from None
    others = buffers.of_names(model, description["head"], description["buffers"] or ())
    shapes |= {name: tuple(t.shape) for name, t in others.items()}
    content = files.read_weights(folder, description, 8 * sum(map(math.prod, shapes.values())))
    if content is None:
        return False
    tensors = read_tensors(folder / WEIGHTS, content)
    problems = [f"{p}, or pass strict=False if you mean it" for p in base_problems(model, layers, description["base"])]
    names, wrong = misfits(tensors, shapes)
    problems += names + wrong
    if not adapted and not problems:
        wrong = _misplaced(plan)
        problems += wrong
    message = f"the adapter in {folder} does not fit this {type(model).__name__}:\n- " + "\n- ".join(problems)
    if wrong or (problems and strict):
        raise ValueError(message)
    if problems:
        warnings.warn(message, stacklevel=3)
    if not adapted:
        apply_plan(model, config, plan)
    reshard(model)
    adapter = adapter_of(model)
    target = _trained(model, adapter) | others
    if description["buffers"] is not None:  # the adapter was trained beside the base's, but for its own
        buffers.put_back(model, adapter.head, adapter._base_buffers)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name in target:
                copy_whole_(target[name], tensor)
    return True


def read_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of an adapter's ``adapter_config.json``: config, base, head, buffers (names of those in the file;
    None in one written before there were any), library, info, weights (their hash).

    Raises:
        FileNotFoundError: no adapter at ``path``.
        ValueError: a damaged file.
    """
    folder = Path(path)
    description = files.read_description(folder)
    try:
        _check_description(description)
    except (ValueError, *_OUT_OF_BOUNDS) as error:
        raise ValueError(f"{folder / CONFIG} is not an EFFT adapter configuration: {error}") from None
    return {"info": {}, "buffers": None, **description}


def read_adapter(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of an adapter, without a model.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_description`.
    """
    folder = Path(path)
    description = read_description(folder)
    content = files.read_weights(folder, description)
    return read_adapter(folder) if content is None else (description, read_tensors(folder / WEIGHTS, content))


def _trained(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """Every tensor an adapter stores, by its name in the model's state dict: factors (also a method's frozen ones),
    then the head with its buffers."""
    tensors: dict[str, Tensor] = {f"efft.{name}": t for name, t in adapter.state_dict(keep_vars=True).items()}
    return tensors | head_tensors(model, adapter.head)


def head_tensors(model: nn.Module, head: Iterable[str]) -> dict[str, Tensor]:
    """The parameters and buffers of these modules themselves, by their names in the model's state dict.

    What several names share, as the heads of detectors do, is there once, by the first.
    """
    tensors: dict[int, tuple[str, Tensor]] = {}
    for module in head:
        for name, tensor in model.get_submodule(module).state_dict(keep_vars=True).items():
            tensors.setdefault(id(tensor), (plain_name(f"{module}.{name}"), tensor))
    return dict(tensors.values())


def _planned_shapes(model: nn.Module, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what :func:`_trained` would give after applying ``plan``.

    Raises:
        ValueError: a site lies outside its bank.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for group in plan.groups:
        factors = group.build(torch.device("meta"), torch.float32)
        for site in group.sites.values():
            factors.bind(site)
        shapes.update({f"efft.{group.name}.{n}": tuple(t.shape) for n, t in factors.state_dict().items()})
    return shapes | {name: tuple(t.shape) for name, t in head_tensors(model, plan.head).items()}


def _misplaced(plan: Plan) -> list[str]:
    """The weights that do not have the sizes of the parts of their banks, which only a damaged file has."""
    found = []
    for group in plan.groups:
        factors = group.build(torch.device("meta"), torch.float32)
        for name, weight in plan.weights_of(group).items():
            expected, sizes = factors.features(group.sites[name]), (weight.d_in, weight.d_out)
            if expected != sizes or getattr(group.sites[name], "experts", 0) != weight.n_experts:
                found.append(f"{name} is of size {sizes}, and what the adapter has for it of {expected}")
    return found


def _check_description(description: Any) -> None:
    """Raise ValueError if keys are missing, or of another kind than what reads them needs."""
    if not isinstance(description, dict):
        raise ValueError("it is no JSON object")
    for key, expected in (("config", dict), ("base", dict), ("head", list)):
        if not isinstance(description.get(key), expected):
            raise ValueError(f"it needs the keys config, base, head, and {key!r} must be a {expected.__name__}")
    for part, keys in (("config", _fields(description["config"])), ("base", _BASE)):
        lacking = keys - description[part].keys()
        if lacking:
            raise ValueError(f"its {part!r} lacks {', '.join(sorted(lacking))}")
    for key in sorted(_BASE):
        if not isinstance(description["base"][key], dict if key == "layers" else str):
            raise ValueError(f"'base.{key}' must be {'an object' if key == 'layers' else 'a string'}")
    if not all(isinstance(name, str) for name in description["head"]):
        raise ValueError("'head' must be a list of names")
    fingerprint.check(description["base"].get("sketch", ""))
    check_saved_plan(description.get("plan", []))
    saved = description.get("buffers", [])
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise ValueError("'buffers' must be a list of names")
    if not isinstance(description.get("info", {}), dict):
        raise ValueError("'info' must be an object")


def _fields(config: dict[str, Any]) -> set[str]:
    """The keys that a configuration of its method must have."""
    kind = config_type(config)
    return set(kind().to_dict()) - set(kind.meant_before)


def read_tensors(path: Path, content: bytes) -> dict[str, Tensor]:
    """What is in a weights file.

    Raises:
        ValueError: it is damaged, or has something else than finite numbers.
    """
    try:
        tensors = dict(sorted(deserialize(content).items()))  # in every process in the same order
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from None
    check_numbers(tensors, str(path))
    return tensors


def check_numbers(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError if something is no finite number."""
    for name, tensor in tensors.items():
        if tensor.is_complex() or (_FACTOR.match(name) and not tensor.is_floating_point()):
            raise ValueError(f"{source} is damaged: {name} is {tensor.dtype}, expected floating-point numbers")
        if not torch.isfinite(tensor.double()).all():
            raise ValueError(f"{source} is damaged: {name} has NaN or infinite entries")


def misfits(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[str], list[str]]:
    """How a file's tensors differ from those that are expected: in names, and in shapes."""
    missing, unexpected = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
    names = [f"missing tensors: {', '.join(missing)}"] if missing else []
    names += [f"unexpected tensors: {', '.join(unexpected)}"] if unexpected else []
    wrong = {n: t.shape for n, t in tensors.items() if n in shapes and tuple(t.shape) != shapes[n]}
    if not wrong:
        return names, []
    listed = "; ".join(f"{n}: expected {list(shapes[n])}, adapter has {list(shape)}" for n, shape in wrong.items())
    hint = "" if all(map(_FACTOR.match, wrong)) else " (create the model with the adapter's num_classes)"
    return names, [f"wrong shapes: {listed}{hint}"]


def _compare_configs(adapter: Adapter, saved: AdapterConfig, folder: Path) -> None:
    ours, theirs = adapter.config.to_dict(), saved.to_dict()
    ours["head"] = adapter.head
    different = [
        f"{k}: model {ours[k]!r}, adapter {theirs.get(k)!r}"
        for k in ours
        if k not in adapter.config.training_only and ours[k] != theirs.get(k)
    ]
    if different:
        raise ValueError(
            f"the adapter in {folder} was trained with another configuration ({'; '.join(different)}); "
            "call efft.remove(model) first and let load_adapter apply the saved one"
        )


def describe_base(model: nn.Module, layers: list[str]) -> dict[str, Any]:
    """What an adapter records about the model it was trained on: these layers and their weights."""
    return {
        "architecture": architecture(model),
        "layers": {name: _shape(model, name) for name in layers},
        "dtype": str(_base_weight(model, layers[0]).dtype),
        "fingerprint": _fingerprint(model, layers),
        "sketch": _sketch(model, layers),
    }


def base_problems(model: nn.Module, layers: list[str], saved: dict[str, Any]) -> list[str]:
    """How the model differs from the base an adapter was trained on; empty if it does not."""
    ours = describe_base(model, layers)
    if ours["layers"] != saved["layers"]:
        names = set(ours["layers"]) ^ set(saved["layers"])
        sizes = [n for n in ours["layers"] if n not in names and ours["layers"][n] != saved["layers"][n]]
        return [
            f"trained on a {saved['architecture']} with other layers: "
            + "; ".join(
                [f"{n} only in the {'model' if n in ours['layers'] else 'adapter'}" for n in sorted(names)[:3]]
                + [f"{n} is {ours['layers'][n]}, adapter's base had {saved['layers'][n]}" for n in sizes[:3]]
            )
        ]
    if ours["dtype"] == saved["dtype"] and ours["fingerprint"] != saved["fingerprint"]:
        return [
            "the base weights are not those it was trained on (fingerprints differ); load the same pretrained weights"
        ]
    others = fingerprint.differing(layers, ours["sketch"], saved.get("sketch", ""), ours["dtype"], saved["dtype"])
    if ours["dtype"] != saved["dtype"] and others:
        return [
            f"the base weights are not those it was trained on ({len(others)} layers, {min(others)} first, differ by "
            f"more than {saved['dtype']} and {ours['dtype']} explain); load the same pretrained weights"
        ]
    return []


def _base_weight(model: nn.Module, name: str) -> Tensor:
    """An adapted weight without the update, also while that is merged; or the weight of this name in a plain model."""
    module, parameter = locate(model, name)
    update = find_update(model, name)
    weight = update.base_weight if update is not None and update.merged else module._parameters[parameter]
    assert weight is not None
    return stored(module, parameter, weight)


def _shape(model: nn.Module, name: str) -> list[int]:
    """That of a weight, also where it is packed."""
    weight, layer = _base_weight(model, name), locate(model, name)[0]
    if isinstance(layer, nn.Linear) and not can_dequantize(weight):
        return [layer.out_features, layer.in_features]
    return list(full_shape(weight))


def _sketch(model: nn.Module, layers: list[str]) -> str:
    """What :func:`efft.saving.fingerprint.sketch` gives of the weights that are plain."""
    weights = {name: whole(_base_weight(model, name)) for name in layers}
    return fingerprint.sketch({name: weight if is_plain(weight) else None for name, weight in weights.items()})


@torch.no_grad()
def _fingerprint(model: nn.Module, layers: list[str]) -> str:
    """SHA-256 over the first row of every adapted weight of the base (where it is packed, over its first bytes): tells
    pretrained weights apart in milliseconds."""
    digest = hashlib.sha256()
    for name in sorted(layers):
        weight = whole(_base_weight(model, name))
        if can_dequantize(weight):
            first = dequantized(weight)[0].double()
        else:  # as the layer saves it
            module, parameter = locate(model, name)
            first = module.state_dict()[parameter].flatten().view(torch.uint8)[:4096]
        digest.update(first.detach().cpu().numpy().tobytes())
    return digest.hexdigest()
