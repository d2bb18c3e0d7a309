"""Define ``tt_merge_``, which adds a low-rank update D G to a weight in place, for export."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from efft_kernels import eager, reference
from efft_kernels._arguments import check_delta, check_number, no_autocast
from efft_kernels.backends import Backend, declare, resolve


def _fake(W: Tensor, D: Tensor, G: Tensor, sign: float) -> None:
    return None


def _triton() -> ModuleType:
    from efft_kernels.triton import tt_merge

    return tt_merge


_IMPLEMENTATION = declare(
    "tt_merge_",
    # W [d_out, d_in], D [d_in, r1], G [r1, d_out]
    "(Tensor(a!) W, Tensor D, Tensor G, float sign) -> ()",
    _fake,
    eager=eager.tt_merge_,
    triton=_triton,
)


@torch.no_grad()
def tt_merge_(
    W: Tensor,  # [d_out, d_in]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
    sign: float = 1.0,
    *,
    backend: str | Backend | None = None,
) -> Tensor:  # W
    """Add the update to ``W`` in place, ``W += sign · (D G)ᵀ``, with one final rounding to W's dtype.

    The sum is computed in fp32, or in fp64 for an fp64 ``W``.

    This is for export and inspection only, because training never needs the dense update. Rounding to bf16 or fp16 can
    lose most of a small update, and merging with ``sign=-1`` does not undo a merge exactly. Keep a copy of ``W`` to
    undo it (as :meth:`efft_kernels.EfftLinear.merge` does).

    Args:
        W: weight ``[d_out, d_in]``, changed in place and returned. No gradient is recorded.
        D: down factor ``[d_in, r1]``.
        G: up factor ``[r1, d_out]``.
        sign: +1 to add the update, -1 to subtract it.
        backend: the backend to use (see :mod:`efft_kernels.backends`).

    Raises:
        TypeError: ``W``, ``D`` or ``G`` is not a tensor, or ``sign`` is not a number.
        ValueError: shapes do not match, or W is an expanded tensor.
        RuntimeError: the requested backend cannot run this call, or the tensors are on different devices.
    """
    check_delta("tt_merge_", W, D, G)
    check_number("tt_merge_", "sign", sign)
    if any(stride == 0 and size > 1 for size, stride in zip(W.shape, W.stride(), strict=True)):
        raise ValueError(
            "tt_merge_: W is an expanded tensor whose entries share memory, so it cannot be changed in place; clone W"
        )
    chosen = resolve("tt_merge_", backend, W, D, G)
    if chosen is Backend.REFERENCE:
        return reference.tt_merge_(W, D, G, sign)
    with no_autocast(W.device):
        _IMPLEMENTATION[chosen](W, D, G, sign)
    return W
