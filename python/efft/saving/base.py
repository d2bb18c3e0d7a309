"""Describe the base model of an adapter for the adapter file, and compare another model with the description."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from efft.adapting.offload import stored
from efft.adapting.placing import find_update, locate
from efft.adapting.sharding import architecture, full_shape, whole
from efft.saving import fingerprint
from efft_kernels.nn.frozen import can_dequantize, dequantized, is_plain


def describe_base(model: nn.Module, layers: list[str]) -> dict[str, Any]:
    """Return the description of the base model that an adapter file stores. It covers the given layers."""
    return {
        "architecture": architecture(model),
        "layers": {name: _shape(model, name) for name in layers},
        "dtype": str(_base_weight(model, layers[0]).dtype),
        "fingerprint": _fingerprint(model, layers),
        "sketch": _sketch(model, layers),
    }


def base_problems(model: nn.Module, layers: list[str], saved: dict[str, Any]) -> list[str]:
    """Return descriptions of the differences between a model and the base model of an adapter, or an empty list."""
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
    theirs = saved.get("sketch", "")
    others = fingerprint.find_differences(layers, ours["sketch"], theirs, ours["dtype"], saved["dtype"])
    if ours["dtype"] != saved["dtype"] and others:
        return [
            f"the base weights are not those it was trained on ({len(others)} layers, {min(others)!r} first, differ by "
            f"more than the rounding errors of {saved['dtype']} and {ours['dtype']}); load the same pretrained weights"
        ]
    return []


def _base_weight(model: nn.Module, name: str) -> Tensor:
    """Return a weight of the base model without the update, even while the update is merged into the weight."""
    module, parameter = locate(model, name)
    update = find_update(model, name)
    weight = update.base_weight if update is not None and update.merged else module._parameters[parameter]
    assert weight is not None
    return stored(module, parameter, weight)


def _shape(model: nn.Module, name: str) -> list[int]:
    """Return the shape of a weight, including packed (quantized) weights."""
    weight, layer = _base_weight(model, name), locate(model, name)[0]
    if isinstance(layer, nn.Linear) and not can_dequantize(weight):
        return [layer.out_features, layer.in_features]
    return list(full_shape(weight))


def _sketch(model: nn.Module, layers: list[str]) -> str:
    """Return the sketch (:func:`efft.saving.fingerprint.sketch`) of the weights that are not packed."""
    weights = {name: whole(_base_weight(model, name)) for name in layers}
    return fingerprint.sketch({name: weight if is_plain(weight) else None for name, weight in weights.items()})


@torch.no_grad()
def _fingerprint(model: nn.Module, layers: list[str]) -> str:
    """Return the SHA-256 of the first row of every adapted base weight, or of the first bytes of a packed weight.

    This hash distinguishes pretrained weights within milliseconds.
    """
    digest = hashlib.sha256()
    for name in sorted(layers):
        weight = whole(_base_weight(model, name))
        if can_dequantize(weight):
            first = dequantized(weight)[0].double()
        else:  # the packed weight, in the form in which the layer saves it
            module, parameter = locate(model, name)
            first = module.state_dict()[parameter].flatten().view(torch.uint8)[:4096]
        digest.update(first.detach().cpu().numpy().tobytes())
    return digest.hexdigest()
