"""Adapted layers whose weight something put on after ``efft.apply`` computes from others."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

#: What adapted layers have of their own.
_OWN = ("weight", "bias", "base_weight", "factors")


def check_stored(layers: Mapping[str, object], operation: str) -> None:
    """Raise ValueError if a layer computes its weight from others, for an ``efft.operation`` on the stored one."""
    for name, layer in layers.items():
        if not isinstance(layer, nn.Module) or "weight" in layer._parameters:
            continue
        kept = [key for key in (*layer._parameters, *layer._buffers, *layer._modules) if key not in _OWN]
        raise ValueError(
            f"efft.{operation}: {name} computes its weight anew in each pass, from {', '.join(kept)} (a pruning mask, "
            "weight_norm, spectral_norm or their like, put on after efft.apply), and the stored weight is another: "
            "make it an ordinary weight first (prune.remove, parametrize.remove_parametrizations)"
        )
