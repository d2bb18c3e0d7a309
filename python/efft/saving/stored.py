"""Detect adapted layers whose weight is computed from other tensors, because they were changed after ``efft.apply``."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from efft.adapting.placing import Update

#: Parameters, buffers and modules that every adapted layer has.
_OWN = ("weight", "bias", "base_weight", "factors")


def check_stored(updates: Mapping[str, Update], operation: str) -> None:
    """Raise ValueError if a weight is computed from other tensors, because ``operation`` reads the stored weight."""
    for name, update in updates.items():
        module = update if isinstance(update, nn.Module) else update.module
        parameter = "weight" if isinstance(update, nn.Module) else update.name
        if parameter in module._parameters:
            continue
        kept = [key for key in (*module._parameters, *module._buffers, *module._modules) if key not in _OWN]
        raise ValueError(
            f"efft.{operation}: {name!r} computes its weight in each pass from {', '.join(kept)} (a pruning mask, "
            "weight_norm, spectral_norm or something similar was added after efft.apply), so it does not use the "
            "stored weight: make it an ordinary weight first (prune.remove, parametrize.remove_parametrizations)"
        )
