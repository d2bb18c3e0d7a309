"""Save and load adapters.

An adapter consists of ``adapter_model.safetensors`` (the factors and the head), ``adapter_config.json`` and a model
card.
"""

from __future__ import annotations

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

from efft.adapting import buffers, extras
from efft.adapting.adapter import check_not_aside
from efft.adapting.inject import Adapter, adapted_layers, adapter_of, apply_plan, check_plain
from efft.adapting.offload import hooks_aside
from efft.adapting.sharding import check_not_zeros, copy_whole_, once, reshard, whole
from efft.adapting.wrappers import check_unwrapped, plain_name, unwrap
from efft.config import FORMAT_VERSION, AdapterConfig
from efft.methods import config_from_dict, config_type
from efft.planning.extras import Extras
from efft.planning.plan import Plan, check_saved_plan, plan_of_file
from efft.saving import files, fingerprint
from efft.saving.base import base_problems, describe_base
from efft.saving.card import model_card
from efft.saving.files import CONFIG, WEIGHTS
from efft_kernels import __version__

#: Errors that Python and torch raise for values that are too large, of a wrong type, or nested too deeply.
_OUT_OF_BOUNDS = (TypeError, OverflowError, RecursionError)

#: Names of factors in the adapters of this library and in the checkpoints that it imports.
_FACTOR = re.compile(r"efft\.|.*\.lora_[AB]\.|.*FacT")

#: Keys of the description of the base model in an adapter file.
_BASE = {"architecture", "layers", "dtype", "fingerprint"}


def save_adapter(model: nn.Module, path: str | os.PathLike[str], info: dict[str, Any] | None = None) -> Path:
    """Write the trained part of an adapted model to the folder ``path``.

    This part consists of the factors, the head, the trained biases and norms, and the buffers that training changed.

    A model that is sharded by ``fully_shard`` or ZeRO-3 is gathered tensor by tensor. Every process must then call this
    function; rank 0 writes, and all processes return after the files are complete.

    Args:
        model: a model that :func:`efft.apply` has adapted; it may be merged, and wrapped by DDP or a similar wrapper.
        path: the folder, which is created if needed. An earlier adapter in the folder is replaced atomically. If the
            process is killed, the folder holds either the old or the new adapter
            (:func:`efft.saving.files.write_adapter`).
        info: facts to store with the weights (accuracy, command, ...). They must be convertible to JSON. The model card
            shows them.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not adapted, or ``info`` is too long.
        TypeError: ``info`` cannot be converted to JSON.
        OSError: the disk is full, or permission is missing. After every error, the folder still holds the earlier
            adapter.
        RuntimeError: rank 0 could not write (raised in the other processes), or the model is within a block of
            :func:`efft.disabled` that has replaced trained biases, norms or buffers, or it has lost an adapted layer.
    """
    model = unwrap(model)
    adapter, folder = adapter_of(model), Path(path)
    check_not_aside(adapter, "save_adapter")
    adapted_layers(model)  # raises RuntimeError if the model has lost one
    reshard(model)
    others = buffers.changed(model, adapter.head, adapter._base_buffers)
    trained = _adapter_tensors(model, adapter) | others
    tensors = {name: whole(t).detach().contiguous().cpu() for name, t in trained.items()}
    description = {
        "config": adapter.config.to_dict(),
        "base": describe_base(model, adapter.layers),
        "head": adapter.head,
        "extras": adapter.extras,
        "plan": adapter.plan,
        "buffers": sorted(others),
        "library": f"efft-kernels {__version__}",
        "info": info or {},
    }
    weights, card = serialize(tensors, {"format_version": str(FORMAT_VERSION)}), model_card(model, description)
    once(model, lambda: files.write_adapter(folder, weights, description, card))
    return folder


def load_adapter(model: nn.Module, path: str | os.PathLike[str], strict: bool = True) -> nn.Module:
    """Load an adapter into ``model``. If the model is not adapted yet, it is first adapted as the file describes.

    The file contains the exact names of the adapted layers, so patterns in its configuration are not used. The model is
    changed only after all checks have passed. With ``strict=False``, missing or unexpected tensors and different base
    weights only cause a warning. Shapes must always fit.

    Returns:
        The same ``model``.

    Raises:
        FileNotFoundError: the folder ``path`` holds no adapter.
        ValueError: a file is damaged, or the model has another configuration, other layers or other weights than the
            model on which the adapter was trained.
    """
    folder = Path(path)
    while not load_described(model, folder, read_description(folder), strict):
        pass
    return model


def load_described(model: nn.Module, folder: Path, description: dict[str, Any], strict: bool) -> bool:
    """Load the adapter with the given ``description`` (from :func:`read_description`).

    Returns:
        Whether the adapter was loaded. If another adapter has replaced the files in the meantime, the result is False
        and the model is unchanged.
    """
    try:
        config = config_from_dict(description["config"])
    except _OUT_OF_BOUNDS as error:
        raise ValueError(f"{folder / CONFIG} is not an EFFT adapter configuration: {error!r}") from None
    if config.head not in (None, description["head"]):
        raise ValueError(
            f"{folder / CONFIG} is not an EFFT adapter configuration: its 'head' {description['head']} is not the one "
            f"in its 'config', {config.head}"
        )
    if description["extras"] and config.extras == Extras():
        raise ValueError(
            f"{folder / CONFIG} is not an EFFT adapter configuration: it has 'extras', which its 'config' does not "
            "train (bias, norms)"
        )
    config.head = description["head"]
    check_not_zeros(model, "load_adapter")
    adapter = getattr(unwrap(model), "efft", None)
    adapted = isinstance(adapter, Adapter)
    if isinstance(adapter, Adapter):
        model = unwrap(model)
        check_not_aside(adapter, "load_adapter")
        if any(layer.merged for layer in adapted_layers(model).values()):
            raise ValueError("an update is merged into this model's weights; call efft.unmerge(model) before loading")
        _compare_configs(adapter, config, folder)
        layers, shapes = adapter.layers, {name: tuple(t.shape) for name, t in _adapter_tensors(model, adapter).items()}
    else:
        check_unwrapped(model, "load_adapter")
        try:
            check_plain(model)
            with hooks_aside(model):
                plan = plan_of_file(
                    model, config, description.get("plan", []), description["base"], description["extras"]
                )
            layers, shapes = list(plan.weights), _planned_shapes(model, plan)
        except (ValueError, RuntimeError, *_OUT_OF_BOUNDS) as error:  # RuntimeError: sizes that are too large
            raise ValueError(f"the adapter in {folder} does not fit this {type(model).__name__}: {error}") from None
    others = buffers.of_names(model, description["head"], description["buffers"] or ())
    shapes |= {name: tuple(t.shape) for name, t in others.items()}
    content = files.read_weights(folder, description, 8 * sum(map(math.prod, shapes.values())))
    if content is None:
        return False
    tensors = read_tensors(folder / WEIGHTS, content)
    differences = base_problems(model, layers, description["base"])
    problems = [f"{difference}, or pass strict=False to load it anyway" for difference in differences]
    names, wrong = misfits(tensors, shapes)
    problems += names + wrong
    if not adapted and not problems:
        wrong = _find_misplaced(plan)
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
    target = _adapter_tensors(model, adapter) | others
    if description["buffers"] is not None:  # older files do not contain buffers
        buffers.put_back(model, adapter.head, adapter._base_buffers)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name in target:
                copy_whole_(target[name], tensor)
    return True


def read_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the contents of an adapter's ``adapter_config.json``.

    The keys are config, base, head, plan (the groups of layers; missing in older files), extras (the names of the
    biases and norms in the weights file), buffers (the names of the buffers in the weights file; None if the adapter
    was saved by a version that did not save buffers), library, info, and weights (the hash of the weights file).

    Raises:
        FileNotFoundError: the folder ``path`` holds no adapter.
        ValueError: the file is damaged.
    """
    folder = Path(path)
    description = files.read_description(folder)
    try:
        _check_description(description)
    except (ValueError, *_OUT_OF_BOUNDS) as error:
        raise ValueError(f"{folder / CONFIG} is not an EFFT adapter configuration: {error}") from None
    return {"info": {}, "buffers": None, "extras": [], **description}


def read_adapter(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the description and the tensors of an adapter, without a model.

    Raises:
        FileNotFoundError, ValueError: same as for :func:`read_description`.
    """
    folder = Path(path)
    description = read_description(folder)
    content = files.read_weights(folder, description)
    return read_adapter(folder) if content is None else (description, read_tensors(folder / WEIGHTS, content))


def _adapter_tensors(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """Return every tensor that an adapter stores, by its name in the model's state dict.

    These are the factors (including the frozen factors of a method), the head with its buffers, and the trained biases
    and norms.
    """
    tensors: dict[str, Tensor] = {f"efft.{name}": t for name, t in adapter.state_dict(keep_vars=True).items()}
    return tensors | head_tensors(model, adapter.head) | extras.parameters_of(model, adapter.extras)


def head_tensors(model: nn.Module, head: Iterable[str]) -> dict[str, Tensor]:
    """Return the parameters and buffers of these modules, by their names in the model's state dict.

    A tensor that several modules share, as the heads of detectors do, is included once, under its first name.
    """
    tensors: dict[int, tuple[str, Tensor]] = {}
    for module in head:
        for name, tensor in model.get_submodule(module).state_dict(keep_vars=True).items():
            tensors.setdefault(id(tensor), (plain_name(f"{module}.{name}"), tensor))
    return dict(tensors.values())


def _planned_shapes(model: nn.Module, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors that :func:`_adapter_tensors` would return after applying ``plan``.

    Raises:
        ValueError: a site lies outside its bank.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for group in plan.groups:
        factors = group.build(torch.device("meta"), torch.float32)
        for site in group.sites.values():
            factors.bind(site)
        shapes.update({f"efft.{group.name}.{n}": tuple(t.shape) for n, t in factors.state_dict().items()})
    trained = head_tensors(model, plan.head) | extras.parameters_of(model, plan.extras)
    return shapes | {name: tuple(t.shape) for name, t in trained.items()}


def _find_misplaced(plan: Plan) -> list[str]:
    """Describe weights whose sizes differ from those of their factors, which happens only with damaged files."""
    found = []
    for group in plan.groups:
        factors = group.build(torch.device("meta"), torch.float32)
        for name, weight in plan.weights_of(group).items():
            expected, sizes = factors.sizes(group.sites[name]), (weight.d_in, weight.d_out)
            if expected != sizes or getattr(group.sites[name], "experts", 0) != weight.n_experts:
                found.append(f"{name!r} is of size {sizes}, but its update in the adapter is of size {expected}")
    return found


def _check_description(description: Any) -> None:
    """Raise ValueError if keys are missing or values have the wrong types."""
    if not isinstance(description, dict):
        raise ValueError("it is not a JSON object")
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
    for key in ("buffers", "extras"):
        saved = description.get(key, [])
        if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
            raise ValueError(f"{key!r} must be a list of names")
    if not isinstance(description.get("info", {}), dict):
        raise ValueError("'info' must be an object")


def _fields(config: dict[str, Any]) -> set[str]:
    """Return the keys that the configuration of a method must have."""
    kind = config_type(config)
    return set(kind().to_dict()) - set(kind.meant_before)


def read_tensors(path: Path, content: bytes) -> dict[str, Tensor]:
    """Return the tensors of a weights file, given its content.

    Raises:
        ValueError: the file is damaged, or contains values other than finite numbers.
    """
    try:
        tensors = dict(sorted(deserialize(content).items()))  # every process must have the same order
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from None
    check_numbers(tensors, str(path))
    return tensors


def check_numbers(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError if an entry is not a finite number, or if a factor has no floating-point type."""
    for name, tensor in tensors.items():
        if tensor.is_complex() or (_FACTOR.match(name) and not tensor.is_floating_point()):
            raise ValueError(f"{source} is damaged: {name} is {tensor.dtype}, expected floating-point numbers")
        if not torch.isfinite(tensor.double()).all():
            raise ValueError(f"{source} is damaged: {name} has NaN or infinite entries")


def misfits(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[str], list[str]]:
    """Describe how a file's tensors differ from the expected tensors, first in names and then in shapes."""
    missing, unexpected = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
    names = [f"missing tensors: {', '.join(missing)}"] if missing else []
    names += [f"unexpected tensors: {', '.join(unexpected)}"] if unexpected else []
    wrong = {n: t.shape for n, t in tensors.items() if n in shapes and tuple(t.shape) != shapes[n]}
    if not wrong:
        return names, []
    listed = "; ".join(f"{n}: expected {list(shapes[n])}, adapter has {list(shape)}" for n, shape in wrong.items())
    # A different number of classes changes only the first dimension of a head. Other differences mean another model.
    classes = all(not _FACTOR.match(n) and shape[1:] == shapes[n][1:] and len(shape) for n, shape in wrong.items())
    hint = " (create the model with the adapter's num_classes)" if classes else ""
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
            "call efft.remove(model) first and let load_adapter apply the saved configuration"
        )
