"""Define hooks that check what ``load_state_dict`` loads into an adapted model, and record the values of the base.

The hooks refuse two kinds of state dicts. If the weights in a state dict contain a merged update, the factors of a
model that is not merged would add the update again. If the update of the model is merged and the state dict replaces
weights or factors, the merged weights would no longer contain the update of the factors.

A state dict without factors belongs to a base model. Its biases, norms and buffers are the values that
``efft.disabled`` and ``efft.remove`` restore. A state dict with factors contains the trained values instead. If its
frozen weights are those of another base, that base's values of biases, norms and buffers are not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from efft.adapting import buffers, extras
from efft.adapting.adapter import Adapter, check_not_aside
from efft.adapting.placing import Update, updates_by_parameter
from efft.adapting.wrappers import plain_name
from efft_kernels.nn.frozen import is_plain

#: The key in the metadata of a state dict that marks a model whose update is merged.
_MERGED = "efft_merged"
#: About how many entries of a weight are compared, spread over the whole weight.
_SAMPLED = 4096


class Loading(NamedTuple):
    """Describe a state dict while the model loads it.

    Attributes:
        names: the names of the tensors in the state dict.
        has_factors: whether the state dict contains factors.
        replaced: the update of one weight that gets other values, and the previous values of this weight. None if no
            weight gets other values.
    """

    names: frozenset[str]
    has_factors: bool
    replaced: tuple[Update, Tensor] | None


def hooks_for(model: nn.Module) -> list[Any]:
    """Register all hooks that this module defines on an adapted model, and return their handles."""
    return [
        model.register_state_dict_post_hook(_mark_merged),
        model.register_load_state_dict_pre_hook(_before),
        model.register_load_state_dict_post_hook(_after),
    ]


def check_base_known(model: nn.Module, adapter: Adapter) -> None:
    """Check that the base's values of all trained biases, norms and buffers are known.

    Raises:
        ValueError: a value is not known, because the model was on the meta device when it was adapted, or because it
            has loaded the checkpoint of a model with another base since then.
    """
    extras.check_known(model, adapter._base_extras)
    if adapter._unknown:
        raise ValueError(
            f"the base's values of {min(adapter._unknown)!r} are not known, because a state dict with factors and with "
            "the weights of another base was loaded: load the state dict of that base first, or adapt a model that has "
            "the weights of the base"
        )


def _mark_merged(model: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    if any(update.merged for update in updates_by_parameter(model).values()):
        local_metadata[_MERGED] = True


def _before(
    model: nn.Module, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *rest: Any
) -> None:
    """Check a state dict before the model loads it.

    Raises:
        ValueError: the state dict contains a merged update and the update of the model is not merged, or the update of
            the model is merged and the state dict has other weights or factors. The model is unchanged.
        RuntimeError: the model is within a block of ``efft.disabled`` that has replaced biases, norms or buffers.
    """
    adapter = getattr(model, "efft", None)
    if not isinstance(adapter, Adapter):
        return
    check_not_aside(adapter, "load_state_dict")
    new = {plain_name(k.removeprefix(prefix)): t for k, t in state_dict.items() if k.startswith(prefix)}
    updates = {plain_name(name): update for name, update in updates_by_parameter(model).items()}
    factors = {f"efft.{name}": t for name, t in adapter.state_dict().items()}
    merged = any(update.merged for update in updates.values())
    replaced = next((u for name, u in updates.items() if name in new and _differs(u.stored, new[name])), None)
    if local_metadata.get(_MERGED, False) and not merged and replaced is not None:
        raise ValueError(_TWICE)
    if merged and (replaced is not None or any(_differs(t, new[name]) for name, t in factors.items() if name in new)):
        raise ValueError(
            "an update is merged into this model's weights, and the state dict has other weights or factors; call "
            "efft.unmerge(model) before loading"
        )
    before = None if replaced is None else (replaced, replaced.stored.detach().clone())
    adapter._loading = Loading(frozenset(new), not factors.keys().isdisjoint(new), before)


@torch.no_grad()
def _after(model: nn.Module, incompatible: Any) -> None:
    """Record which of the loaded values are those of the base.

    Raises:
        ValueError: the loaded weights contain the update of the loaded factors.
    """
    adapter = getattr(model, "efft", None)
    loading = adapter._loading if isinstance(adapter, Adapter) else None
    if not isinstance(adapter, Adapter) or loading is None:
        return
    adapter._loading = None
    now = {
        **{name: (t, adapter._base_buffers) for name, t in buffers.snapshot(model, adapter.head).items()},
        **{name: (t, adapter._base_extras) for name, t in extras.snapshot(model, adapter.extras).items()},
    }
    loaded = {name: place for name, place in now.items() if name in loading.names}
    if not loading.has_factors:
        for name, (value, base) in loaded.items():
            base[name] = value
        adapter._unknown -= loaded.keys()
    elif loading.replaced is not None:
        if _is_update(*loading.replaced):
            raise ValueError(_TWICE)
        adapter._unknown |= {n for n, (value, base) in loaded.items() if n in base and _differs(base[n], value)}


def _is_update(update: Update, before: Tensor) -> bool:
    """Return whether the current weight is ``before`` plus its update, up to rounding."""
    try:
        delta = update.delta_weight().double()
    except ValueError:  # the method does not update weights, so nothing can have been merged
        return False
    change = update.stored.double() - before.to(delta)
    return bool(delta.norm() > 10 * (change - delta).norm())


_TWICE = (
    "the state dict is that of a model whose update was merged, so this model would add the update a second time: call "
    "efft.unmerge before state_dict(), or use efft.save_adapter or efft.merged_state_dict"
)


def _differs(tensor: Tensor, new: Any) -> bool:
    """Return whether a tensor would get other values. Tensors that cannot be compared count as equal."""
    if not isinstance(new, Tensor) or tensor.shape != new.shape or tensor.is_meta or new.is_meta:
        return False
    if not all(is_plain(t) and not hasattr(t, "full_tensor") for t in (tensor, new)):
        return False
    old, other = _sample(tensor), _sample(new).to(tensor)
    return not bool(((old == other) | ((old != old) & (other != other))).all())


def _sample(tensor: Tensor) -> Tensor:
    """Return about :data:`_SAMPLED` entries of a tensor as a vector."""
    entries = tensor.detach().flatten()
    return entries[:: max(1, len(entries) // _SAMPLED)]
