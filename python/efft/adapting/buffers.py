"""Copy, compare and restore the buffers that training changes, such as the running statistics of batch norms.

:func:`statistics` finds the modules that update such buffers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from efft.adapting.wrappers import plain_name
from efft_kernels.nn.frozen import is_plain
from efft_kernels.nn.linear import AdaptedLayer

#: Maximum number of elements of integer buffers that training might change (counters). Larger buffers are tables and
#: packed weights.
_LARGEST_COUNTERS = 2**12


def _places(model: nn.Module, head: Iterable[str]) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (name in the state dict, module, name in the module) of every buffer that training might change.

    These are the persistent buffers that contain floating-point or complex numbers, or at most
    :data:`_LARGEST_COUNTERS` integers. The buffers of the head, of the adapter and of adapted layers are not among
    them, and neither are packed (quantized) tensors.
    """
    apart: set[int] = set()
    for name in head:
        apart |= {id(m) for m in model.get_submodule(name).modules()}
    for prefix, module in model.named_modules():
        if id(module) in apart or isinstance(module, AdaptedLayer) or plain_name(prefix).split(".")[0] == "efft":
            continue
        for name, buffer in module._buffers.items():
            if buffer is None or name in module._non_persistent_buffers_set or not is_plain(buffer):
                continue
            if buffer.is_floating_point() or buffer.is_complex() or buffer.numel() <= _LARGEST_COUNTERS:
                yield plain_name(f"{prefix}.{name}" if prefix else name), module, name


def snapshot(model: nn.Module, head: Iterable[str]) -> dict[str, Tensor]:
    """Return copies of the buffers that training might change, by their names in the state dict."""
    return {name: module._buffers[key].detach().clone() for name, module, key in _places(model, head)}  # type: ignore


def changed(model: nn.Module, head: Iterable[str], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the buffers whose values differ from ``base``, a :func:`snapshot`.

    A buffer that was on the meta device at the time of the snapshot and is not there now counts as changed, because it
    got its values later. A buffer that ``base`` does not contain is not returned.
    """
    return {name: module._buffers[key] for name, module, key in _changed(model, head, base)}  # type: ignore


def of_names(model: nn.Module, head: Iterable[str], names: Iterable[str]) -> dict[str, Tensor]:
    """Return those of the named buffers that the model has and that training might change."""
    wanted = set(names)
    return {n: module._buffers[key] for n, module, key in _places(model, head) if n in wanted}  # type: ignore


@torch.no_grad()
def put_back(model: nn.Module, head: Iterable[str], base: Mapping[str, Tensor]) -> None:
    """Copy the values of ``base`` into the buffers, except those that are on the meta device in ``base``."""
    for name, module, key in list(_changed(model, head, base)):
        buffer = module._buffers[key]
        assert buffer is not None
        if not base[name].is_meta:
            buffer.copy_(base[name])


@contextmanager
def as_in_base(model: nn.Module, head: Iterable[str], base: Mapping[str, Tensor]) -> Iterator[bool]:
    """Replace the buffers that differ from ``base`` by copies of ``base`` within the ``with`` block.

    Buffers that are on the meta device in ``base`` are not replaced. Changes to the copies are lost. Yield whether a
    buffer was replaced.
    """
    trained = []
    for name, module, key in list(_changed(model, head, base)):
        buffer = module._buffers[key]
        assert buffer is not None
        if not base[name].is_meta:
            trained.append((module, key, buffer))
            module._buffers[key] = base[name].to(buffer, copy=True)
    try:
        yield bool(trained)
    finally:
        for module, key, buffer in trained:
            module._buffers[key] = buffer


def check_none(adapter: str, changed: Collection[str]) -> None:
    """Check that the training of an adapter has not changed buffers of the base model.

    The adapter will share its base model, and therefore the buffers, with other adapters.

    Args:
        adapter: the name of the adapter.
        changed: the names of the buffers that its training changed.

    Raises:
        ValueError: training has changed buffers.
    """
    if changed:
        raise ValueError(
            f"adapter {adapter!r} comes with buffers that its training changed ({len(changed)}, for example "
            f"{min(changed)!r}): all adapters of a pool use the base's buffers (such as statistics of batch norms); "
            "train with freeze_statistics=True, or load this adapter with efft.load_adapter into a separate model"
        )


def statistics(model: nn.Module, head: Iterable[str]) -> list[nn.Module]:
    """Return the modules that may update their own floating-point buffers during training.

    These are batch norms, instance norms, and all other modules without children that have such buffers, because the
    forward pass of an unknown module may update them.
    """
    found = {
        id(module): module
        for _, module, key in _places(model, head)
        if (isinstance(module, nn.modules.batchnorm._NormBase) or not any(module.children()))
        and module._buffers[key].is_floating_point()  # type: ignore[union-attr]
    }
    return list(found.values())


def _changed(model: nn.Module, head: Iterable[str], base: Mapping[str, Tensor]) -> Iterator[tuple[str, nn.Module, str]]:
    for name, module, key in _places(model, head):
        buffer, before = module._buffers[key], base.get(name)
        assert buffer is not None
        if before is None or buffer.is_meta:
            continue
        if before.is_meta or not _same(buffer, before.to(buffer)):
            yield name, module, key


def _same(buffer: Tensor, before: Tensor) -> bool:
    """Return whether two tensors of one dtype have the same values. NaN counts as equal to NaN."""
    return torch.equal(buffer, before) or bool(((buffer == before) | ((buffer != buffer) & (before != before))).all())
