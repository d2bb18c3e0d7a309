"""Pack factors once per forward pass, in the dtype and layout that the kernels need.

The update of a layer is D G, the product of the factors D [d_in, r] and G [r, d_out]. The kernels of the cuda backend
read D as [r, d_in] and G as [d_out, r] and [r, d_out], all in the dtype of the activations. Without this module, each
call of a layer copies the factors of this layer into these layouts.

A bank is the module that holds the factors of many layers. At the start of a forward pass, it composes D and G of all
its layers (:meth:`efft_kernels.nn.FactorBank.prepare`). With this module, the bank then attaches a :class:`Stack` to
each G (:func:`attach`). The first layer that multiplies packs the factors of all layers of the stack, and the other
layers find the packed factors (:func:`find`).

The module is active only if the environment variable ``EFFT_SM90_GENERATION`` selects the second or the third
generation of the CUDA kernels (see ENVIRONMENT.md). Neither is the default, because they have run only in the emulator
of the project's tests and not on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from efft_kernels.backends import Backend
from efft_kernels.measured import requested_kernels

#: The backends whose kernels read packed factors.
BACKENDS = (Backend.CUDA,)
_ATTRIBUTE = "_efft_stack"
_ALIGNED = 8  # rows begin at multiples of 8 elements, which are 16 bytes in half precision


class Packed(NamedTuple):
    """Hold the packed factors of one layer.

    Attributes:
        D: ``[d_in, r]`` for both passes, stored as ``[r, d_in]``.
        G: ``[r, d_out]`` for the forward pass, stored as ``[d_out, r]``.
        G_rows: ``[r, d_out]`` for the backward pass, stored as ``[r, d_out]``.
    """

    D: Tensor
    G: Tensor
    G_rows: Tensor


class Stack:
    """Hold the factors of several layers, and pack all of them when the first layer asks for its packed factors."""

    def __init__(self, D: Tensor, G: Tensor) -> None:
        """Store views of D and G for n layers. D is ``[d_in, r]`` if all layers share it, else ``[n, d_in, r]``.

        G is ``[n, r, d_out]``.
        """
        self.D, self.G = D.detach(), G.detach()
        self._versions = D._version, G._version
        self._packed: dict[torch.dtype, list[Packed]] = {}

    def packed(self, i: int, D: Tensor, dtype: torch.dtype) -> Packed | None:
        """Return the packed factors of layer i in ``dtype``.

        Return None if ``D`` is not the factor that the bank composed for this layer, or if D or G was changed in place
        after this object was created.
        """
        own = self.D if self.D.dim() == 2 else self.D[i]
        same = D.data_ptr() == own.data_ptr() and D.shape == own.shape and D.stride() == own.stride()
        if not same or (self.D._version, self.G._version) != self._versions:
            return None
        if dtype not in self._packed:
            with torch.no_grad():
                n = len(self.G)
                D, G, rows = _transposed(self.D, dtype), _transposed(self.G, dtype), _copy(self.G, dtype)
                shared = [D] * n if D.dim() == 2 else D.unbind(0)
                self._packed[dtype] = [Packed(*each) for each in zip(shared, G.unbind(0), rows.unbind(0), strict=True)]
        return self._packed[dtype][i]


def is_on() -> bool:
    """Return whether this process uses kernels of the second generation or a later one."""
    return requested_kernels() >= 2


def attach(D: Tensor, G: Tensor, of_layers: Sequence[Tensor]) -> None:
    """Make :func:`find` return packed factors for n layers.

    Do nothing if :func:`is_on` is False, or in code that is compiled or transformed by ``torch.func``.

    Args:
        D: ``[d_in, r]``, which all layers share, or ``[n, d_in, r]``.
        G: ``[n, r, d_out]``, or ``[1, r, d_out]`` if all layers share it.
        of_layers: the n tensors ``[r, d_out]`` that the layers get as their G.
    """
    if not is_on() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    stack = Stack(D, G)
    for i, one in enumerate(of_layers):  # layers that share their cores share one G
        setattr(one, _ATTRIBUTE, (stack, i if len(G) > 1 else 0))


def find(backend: Backend, dtype: torch.dtype, D: Tensor, G: Tensor) -> Packed | None:
    """Return the packed factors in ``dtype`` of the layer that multiplies by ``D`` and ``G``; None if it has none."""
    if backend not in BACKENDS or torch.compiler.is_compiling():
        return None
    attached = getattr(G, _ATTRIBUTE, None)
    if attached is None:
        return None
    stack, i = attached
    found: Packed | None = stack.packed(i, D, dtype)
    return found


def _copy(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy [..., rows, columns] whose rows begin at multiples of 16 bytes."""
    columns = factor.shape[-1]
    padded = (columns + _ALIGNED - 1) // _ALIGNED * _ALIGNED
    return factor.new_empty(*factor.shape[:-1], padded, dtype=dtype)[..., :columns].copy_(factor)


def _transposed(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy [..., rows, columns] that is stored as [..., columns, rows]."""
    return _copy(factor.transpose(-1, -2), dtype).transpose(-1, -2)
