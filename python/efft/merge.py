"""Merge the update into the weights of an adapted model, and restore the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from efft.adapting.adapter import SHARING, check_not_aside
from efft.adapting.inject import adapted_layers, adapter_of
from efft.adapting.offload import check_present
from efft.adapting.placing import Update, updates_by_parameter
from efft.adapting.sharding import check_whole
from efft.adapting.wrappers import plain_name, unwrap
from efft.saving.stored import check_stored
from efft_kernels.nn.adapted import MergeLoss
from efft_kernels.nn.frozen import can_dequantize, dequantized, is_plain


@dataclass(frozen=True)
class MergeReport:
    """Report the effect of merging on each layer. Printing the report gives a summary."""

    layers: dict[str, MergeLoss]

    @property
    def worst(self) -> tuple[str, MergeLoss] | None:
        """The layer that lost the largest part of its update to rounding, or None if nothing was merged."""
        if not self.layers:
            return None
        return max(self.layers.items(), key=lambda item: item[1].relative_error)

    def __str__(self) -> str:
        if self.worst is None:
            return "nothing to merge: all layers were merged already"
        name, loss = self.worst
        mean = sum(m.relative_update for m in self.layers.values()) / len(self.layers)
        text = (
            f"merged {len(self.layers)} layers: mean |dW|/|W| = {mean:.2e}; "
            f"largest part of an update lost to rounding: {loss.relative_error:.1e} ({name})"
        )
        if loss.relative_error > 0.01:
            text += "; the weights are too coarse for this update: merge into float32 weights (model.float())"
        return text


def merge(model: nn.Module, dequantize: bool = False) -> MergeReport:
    """Add every update to its weight in fp32 with one rounding, so that inference is as fast as with the base model.

    The layers keep copies of the base weights, so that :func:`unmerge` is exact. This doubles the memory of the adapted
    layers. Merging a merged model does nothing. With ``dequantize``, dense weights replace quantized ones until
    :func:`unmerge`.

    Raises:
        TypeError: a weight is quantized, and ``dequantize`` is not set or its class cannot dequantize it. Nothing is
            changed.
        ValueError: the model is not adapted, is sharded or has offloaded weights; an update has non-finite entries; a
            layer computes its weight from other tensors (a parametrization, for example); or other models share the
            weights. Nothing is changed.
        RuntimeError: the update is disabled by :func:`efft.disabled`, or the model has lost an adapted layer
            (:func:`adapted_layers`). Nothing is changed.
    """
    model = unwrap(model)
    adapter = adapter_of(model)
    check_whole(model, "merge")
    if adapter in SHARING:
        raise ValueError(
            "the frozen weights of this model belong to an efft.SharedBackbone, and merging would change them for its "
            "other models too: merge a copy of the model (copy.deepcopy), or use efft.merged_state_dict"
        )
    layers = adapted_layers(model)
    check_stored(layers, "merge")
    check_present(model, "merge")
    if not adapter.enabled and not any(layer.merged for layer in layers.values()):
        raise RuntimeError("the update is switched off by efft.disabled; merge outside its with block")
    for name, factor in adapter.named_parameters("efft"):
        if not torch.isfinite(factor).all():
            raise ValueError(f"factor {name!r} has NaN or infinite entries; nothing was merged")
    for name, layer in layers.items():
        if not torch.isfinite(layer.delta_weight()).all():
            raise ValueError(f"the update of {name!r} has NaN or infinite entries; nothing was merged")
    _check_plain(layers, dequantize)
    losses = {name: layer.merge(dequantize) for name, layer in layers.items()}
    adapter.enabled = False
    return MergeReport({name: loss for name, loss in losses.items() if loss is not None})


def unmerge(model: nn.Module) -> None:
    """Undo :func:`merge`: restore the base weights exactly, and let the layers add their updates again."""
    model = unwrap(model)
    merged = [layer for layer in adapted_layers(model).values() if layer.merged]
    for layer in merged:
        layer.unmerge()
    if merged:
        adapter_of(model).enabled = True


@torch.no_grad()
def merged_state_dict(
    model: nn.Module, dtype: torch.dtype | None = None, dequantize: bool = False
) -> dict[str, Tensor]:
    """Return a state dict for the model without an adapter, with the update in the weights. The model is not changed.

    Floating-point tensors are cast to ``dtype``; by default they keep their dtype. Weights are merged in fp32 and
    rounded once. With ``dequantize``, the result contains dense weights for the quantized weights of adapted layers.

    Raises:
        TypeError: a weight is quantized, and ``dequantize`` is not set or its class cannot dequantize it.
        ValueError: the model is not adapted, is sharded or has offloaded weights, or a layer computes its weight from
            other tensors (a parametrization, for example).
        RuntimeError: the model is within a block of :func:`efft.disabled` that has replaced biases, norms or buffers,
            or it has lost an adapted layer (:func:`adapted_layers`).
    """
    model = unwrap(model)
    check_not_aside(adapter_of(model), "merged_state_dict")
    check_whole(model, "merged_state_dict")
    check_stored(adapted_layers(model), "merged_state_dict")
    check_present(model, "merged_state_dict")
    updates = {plain_name(name): update for name, update in updates_by_parameter(model).items()}
    _check_plain(updates, dequantize)
    state = {}
    for full, value in model.state_dict().items():
        name = plain_name(full)
        if name.startswith("efft."):
            continue
        target = dtype if dtype is not None and value.is_floating_point() else value.dtype
        update = updates.get(name)
        if update is not None and not (update.merged and target == value.dtype):
            delta, base = update.delta_weight(), update.base_weight
            value = dequantized(value if base is None else base).to(delta.dtype) + delta
        state[name] = value.detach().to(target, copy=True)
    return state


def _check_plain(layers: Mapping[str, Update], dequantize: bool) -> None:
    quantized = {n: layer.stored for n, layer in layers.items() if not layer.merged and not is_plain(layer.stored)}
    if quantized and not dequantize:
        name, weight = next(iter(quantized.items()))
        raise TypeError(
            f"{len(quantized)} weights are not plain dense tensors ({name!r} first, a {type(weight).__name__}) and "
            "cannot hold an update: pass dequantize=True to get dense weights instead, or do not merge the update"
        )
    for name, weight in quantized.items():
        if not can_dequantize(weight):
            raise TypeError(
                f"{name!r} has a {type(weight).__name__} for a weight, which has no method to dequantize it: save the "
                "adapter, load it onto a base that is not quantized, and merge there"
            )
