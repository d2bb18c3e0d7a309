"""Adapted layers whose weight something put on after ``efft.apply`` computes from others."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from efft.adapting.placing import Update

#: What adapted layers have of their own.
_OWN = ("weight", "bias", "base_weight", "factors")


def check_stored(updates: Mapping[str, Update], operation: str) -> None:
    """Raise ValueError if a weight is computed from others, for an ``efft.operation`` on the stored one."""
    for name, update in updates.items():
        module = update if isinstance(update, nn.Module) else update.module
        parameter = "weight" if isinstance(update, nn.Module) else update.name
        if parameter in module._parameters:
            continue
        kept = [key for key in (*module._parameters, *module._buffers, *module._modules) if key not in _OWN]
        raise ValueError(
            f"efft.{operation}: {name} computes its weight anew in each pass, from {', '.join(kept)} (a pruning mask, "
            "weight_norm, spectral_norm or their like, put on after efft.apply), and the stored weight is another: "
            "make it an ordinary weight first (prune.remove, parametrize.remove_parametrizations)"
        )
