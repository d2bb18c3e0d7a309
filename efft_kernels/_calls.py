"""Remember for which calls of an op the arguments were checked, and which backend was chosen.

Checking the arguments and choosing a backend takes longer than launching a kernel. The results of both depend only on
the shapes, dtypes and devices of the arguments, on the requested backend, on autocast, and on whether the compiled
library for CPUs is loaded. These values form the *signature* of a call. If an earlier call had the same signature, a
call needs no checks and uses the same backend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from efft_kernels._arguments import autocast_dtype
from efft_kernels.backends import Backend, current_backend
from efft_kernels.measured import is_final
from efft_kernels.native import MISSING

#: The values that determine the result of the checks and the choice of the backend.
Signature = tuple[Any, ...]
#: The backend that was chosen for each signature of an earlier call.
choices: dict[Signature, Backend] = {}
#: The number of signatures to keep: enough for a model, and bounded in case every batch has another length.
_MOST = 4096


def is_transformed() -> bool:
    """Return whether code is being compiled, exported, traced, or transformed by ``torch.func``."""
    return torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._are_functorch_transforms_active()


def is_intercepted() -> bool:
    """Return whether code is being transformed, or a mode such as fake tensors or make_fx receives its operators."""
    return (  # The first three conditions are those of is_transformed, written out because every op calls this one.
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def signature(
    op: str, backend: str | Backend | None, x: Tensor, *others: Tensor | None, setting: object = None
) -> tuple[Signature, torch.dtype | None] | tuple[None, None]:
    """Return the signature of a call of an op, and the dtype to which autocast casts.

    ``x`` is the input of the op, and ``others`` are its other tensors. ``setting`` is a hashable value that represents
    the other arguments on which the checks depend.

    Return (None, None) if the call must be checked in any case. This concerns code that is compiled, traced or
    transformed by ``torch.func``, in which sizes may be symbols, and arguments that are not tensors or have no
    dimension.
    """
    if is_intercepted():
        return None, None
    try:
        device, shape = x.device, x.shape
        dtype = autocast_dtype(device)
        call = (
            *(op, current_backend() if backend is None else backend, setting, dtype, MISSING["cpu"]),
            # On a GPU, the choice of a backend depends on the number of tokens.
            *(shape if device.type == "cuda" else shape[-1], x.dtype, device),
            *[None if t is None else (t.shape, t.dtype, t.device) for t in others],
        )
    except (AttributeError, IndexError):
        return None, None
    return call, dtype


def note_choice(call: Signature | None, chosen: Backend, device: torch.device) -> None:
    """Remember the chosen backend, unless a later measurement may change the choice (:func:`is_final`)."""
    if call is None or (device.type == "cuda" and not is_final(device)):
        return
    if len(choices) >= _MOST:
        choices.clear()
    choices[call] = chosen


def is_differentiated_forward() -> bool:
    """Return whether forward-mode differentiation is active, which ``torch.no_grad()`` does not disable."""
    return forward_ad._current_level >= 0
