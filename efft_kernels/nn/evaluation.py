"""Keep the operands that a bank composed for evaluation, and decide whether they are still current.

A bank is the module that owns the trained factors of many layers. The operands of a layer are the tensors that the bank
composes from the factors and by which the layer multiplies (in general D and G). In evaluation the factors do not
change between two forward passes, so composing the operands again would give the same tensors. :class:`Evaluated` holds
the operands and a record of everything from which they were computed. Before every reuse, this record is compared with
the current state of the bank. On the CPU, every change of a factor is therefore noticed. On other devices, writes that
do not increase the version of a tensor are not noticed (:class:`_Source`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from efft_kernels._calls import is_intercepted
from efft_kernels.backends import current_backend

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


class Evaluated:
    """Hold the operands of all bindings of a bank, computed in eval mode without a graph.

    Attributes:
        operands: the operands of each binding (:class:`efft_kernels.nn.bank.Binding`).
    """

    def __init__(
        self, operands: Mapping[Any, tuple[Tensor, ...]], sources: Sequence[_Source], settings: Hashable
    ) -> None:
        self.operands, self._sources, self._settings = operands, sources, settings

    def is_current(self, tensors: Sequence[Tensor], settings: Hashable) -> bool:
        """Return whether the operands were computed from these tensors and settings, and the tensors are unchanged."""
        return (
            self._settings == settings
            and len(self._sources) == len(tensors)
            and all(source.is_unchanged(tensor) for source, tensor in zip(self._sources, tensors, strict=True))
        )


class _Source:
    """Remember a tensor and its content at one moment.

    The address of the memory and autograd's version of the content reveal a new parameter, a swap of ``.data``, and a
    change in place. An alias keeps the memory allocated, so that no other tensor can get the same address. On the CPU
    a copy of the content is compared as well, because code that writes through ``.data`` or NumPy does not change the
    version, and the comparison takes little time there. On other devices, the comparison would have to wait for the
    device.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, tensor._version
        self._alias = tensor.detach()
        self._copy = tensor.detach().clone() if tensor.device.type == "cpu" else None

    def is_unchanged(self, tensor: Tensor) -> bool:
        alias = self._alias
        return (
            tensor is self._tensor
            and tensor._version == self._version
            and tensor.data_ptr() == alias.data_ptr()
            and tensor.shape == alias.shape
            and tensor.stride() == alias.stride()
            and tensor.dtype == alias.dtype
            and (self._copy is None or torch.equal(tensor, self._copy))
        )


def snapshot(tensors: Sequence[Tensor]) -> list[_Source]:
    """Remember the content of ``tensors``. Call this before computing something from them."""
    return [_Source(tensor) for tensor in tensors]


def can_be_kept(tensors: Sequence[Tensor]) -> bool:
    """Return whether results computed from ``tensors`` now may be used again by later calls.

    The result is False in these cases:

    - Autograd records the results.
    - The code is compiled, exported, traced, transformed or captured. Later runs of such code would not see that the
      factors have changed.
    - A change of one of the tensors could not be noticed.
    - Several processes share the work. Libraries that shard parameters release and refill the memory of the parameters
      between passes.
    """
    if torch.is_grad_enabled() or is_intercepted() or not tensors:
        return False
    return not (
        (torch.distributed.is_available() and torch.distributed.is_initialized())
        or any(type(t) not in _PLAIN or t.is_inference() or t.is_meta for t in tensors)
        or (any(t.is_cuda for t in tensors) and torch.cuda.is_current_stream_capturing())
    )


def surroundings(tensors: Sequence[Tensor]) -> Hashable:
    """Return the state outside of a bank on which the reuse of its operands depends.

    This state consists of the requested backend and the current CUDA streams. Operands that were computed in one stream
    are not reused in another, because that stream would not wait for the kernels that compute them.
    """
    gpus = {t.device for t in tensors if t.is_cuda}
    return current_backend(), tuple(torch.cuda.current_stream(gpu).cuda_stream for gpu in sorted(gpus, key=str))
