"""Manage the stacks of a pool.

A stack holds one tensor of each adapter for one place in the model: D or G of an adapted layer, or the weight or bias
of a layer of the head. Row i of a stack belongs to the adapter in slot i.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from efft_kernels.nn.frozen import stored_in
from efft_kernels.nn.pooled import PooledLinear, PooledWeights

Place = tuple[str, int]
"""The name of a layer, and a number: 0 for D or the weight of a head, and 1 for G or the bias of a head."""


def write_row(
    stacks: dict[Place, Tensor], new: dict[Place, Tensor], layers: Mapping[str, PooledLinear], slot: int, rows: int
) -> dict[Place, Tensor]:
    """Write ``new`` into row ``slot`` and return the stacks.

    A stack that is large enough is changed in place. Other stacks are replaced by larger copies. Places that share a
    stack continue to share it if they also share a tensor in the new adapter.
    """
    sharing: dict[tuple[Any, ...], list[Place]] = {}
    for place in stacks | new:
        tensor = new.get(place)
        same = None if tensor is None else (tensor.data_ptr(), tensor.shape, tensor.stride())
        sharing.setdefault((id(stacks.get(place)), same), []).append(place)
    users = Counter(id(stack) for stack in stacks.values())
    result: dict[Place, Tensor] = {}
    for places in sharing.values():
        old, tensor = stacks.get(places[0]), new.get(places[0])
        sizes = [t for t in (None if old is None else old.shape[1:], None if tensor is None else tensor.shape) if t]
        shape = (rows, *map(max, zip(*sizes, strict=True)))
        if old is not None and old.shape == shape and users[id(old)] == len(places):
            stack = old
        else:
            name, part = places[0]
            weight, known = stored_in(layers[name], "weight"), tensor if old is None else old
            assert known is not None
            # The dtype of a packed weight does not determine the dtype of the operands.
            dtype = weight.dtype if weight.is_floating_point() else known.dtype
            stack = torch.zeros(shape, dtype=dtype, device=weight.device)
            if old is not None:
                _corner(stack, old.shape).copy_(old)
            elif isinstance(layers[name], PooledWeights):
                stack.copy_(stored_in(layers[name], ("weight", "bias")[part]))
        stack[slot] = stack[0]
        if tensor is not None:
            _corner(stack[slot], tensor.shape).copy_(tensor)
        result |= dict.fromkeys(places, stack)
    return result


def _corner(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the part of ``tensor`` with the given shape that starts at the first element."""
    return tensor[tuple(slice(size) for size in shape)]
