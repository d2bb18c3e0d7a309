"""Define ``tt_contract``, which multiplies the cores C of all layers by their shared right factor V in one launch.

Its results are the factors G of the layers, whose updates are D G.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from efft_kernels import eager, reference
from efft_kernels._arguments import check_number, check_shape, check_tensor, no_autocast
from efft_kernels.backends import Backend, declare, resolve


def _fake_fwd(C: Tensor, V: Tensor, keep_C: Tensor | None, keep_V: Tensor | None, scale: float) -> Tensor:
    n_layers, n_cores, r1, _ = C.shape
    return C.new_empty(n_layers, r1, n_cores * V.shape[1])


def _fake_bwd(
    dG: Tensor,
    C: Tensor,
    V: Tensor,
    keep_C: Tensor | None,
    keep_V: Tensor | None,
    scale: float,
    need_dC: bool,
    need_dV: bool,
) -> tuple[Tensor, Tensor]:
    return C.new_empty(C.shape if need_dC else 0), V.new_empty(V.shape if need_dV else 0)


def _triton() -> ModuleType:
    from efft_kernels.triton import tt_contract

    return tt_contract


_FORWARD = declare(
    "tt_contract_fwd",
    # C [n_layers, n_cores, r1, r2], V [r2, d_out], keep_C like C, keep_V [n_layers, r2, d_out] (bool)
    # -> G [n_layers, r1, n_cores * d_out]
    "(Tensor C, Tensor V, Tensor? keep_C, Tensor? keep_V, float scale) -> Tensor",
    _fake_fwd,
    eager=eager.tt_contract_fwd,
    triton=_triton,
)
_BACKWARD = declare(
    "tt_contract_bwd",
    "(Tensor dG, Tensor C, Tensor V, Tensor? keep_C, Tensor? keep_V, float scale, bool need_dC, bool need_dV) "
    "-> (Tensor dC, Tensor dV)",
    _fake_bwd,
    eager=eager.tt_contract_bwd,
    triton=_triton,
)


def tt_contract(
    C: Tensor,  # [n_layers, n_cores, r1, r2]
    V: Tensor,  # [r2, d_out]
    *,
    scale: float | Tensor = 1.0,
    keep_C: Tensor | None = None,  # [n_layers, n_cores, r1, r2], bool
    keep_V: Tensor | None = None,  # [n_layers, r2, d_out], bool
    backend: str | Backend | None = None,
) -> Tensor:  # [n_layers, r1, n_cores * d_out]
    """Contract cores with V for all layers: ``G[l] = scale · [C[l,0] V | C[l,1] V | ...]``.

    To *contract* means to multiply, with a sum over the common index r2. Call this op once per step and pass the
    tensors ``G.unbind(0)`` to the layers. Autograd then stacks the gradients of all layers, and one backward call
    computes dC and dV. The cores of a layer become column blocks, so a fused qkv projection needs only one call of
    ``tt_linear``. For a layer that uses the transposed tensor train (the second layer of an MLP), pass
    ``C.transpose(-1, -2)`` and ``U.t()``.

    The op computes in the factors' own dtype, also under autocast, because factors are small and rounding them would
    round the update.

    Args:
        C: cores ``[n_layers, n_cores, r1, r2]``.
        V: right factor ``[r2, d_out]``, shared by all layers, in the dtype of ``C``.
        scale: a number, or a tensor of one element that can be trained.
        keep_C, keep_V: dropout masks of the factors (True keeps an element), ``[n_layers, n_cores, r1, r2]`` and
            ``[n_layers, r2, d_out]``, with separate random values for each layer. The op does not rescale the elements
            that are kept: multiply ``scale`` by 1/(1-p) for each factor with a mask.
        backend: the backend to use (see :mod:`efft_kernels.backends`).

    Returns:
        ``G [n_layers, r1, n_cores * d_out]`` in the dtype of ``C``.

    Raises:
        TypeError: ``C``, ``V`` or a mask is not a tensor, or ``scale`` is neither a number nor a tensor.
        ValueError: shapes or dtypes do not match.
        RuntimeError: the requested backend cannot run this call, or the tensors are on different devices.
    """
    check_tensor("tt_contract", "C", C)
    check_tensor("tt_contract", "V", V)
    if C.dim() != 4 or V.dim() != 2 or C.shape[3] != V.shape[0]:
        raise ValueError(
            f"tt_contract: expected C [n_layers, n_cores, r1, r2] and V [r2, d_out] with equal r2, "
            f"got shapes {list(C.shape)} and {list(V.shape)}"
        )
    if C.dtype != V.dtype:
        raise ValueError(f"tt_contract: C and V must have the same dtype, got {C.dtype} and {V.dtype}")
    for name, keep, shape, symbols in (
        ("keep_C", keep_C, tuple(C.shape), "[n_layers, n_cores, r1, r2]"),
        ("keep_V", keep_V, (C.shape[0], *V.shape), "[n_layers, r2, d_out]"),
    ):
        if keep is None:
            continue
        check_shape("tt_contract", name, keep, shape, symbols)
        if keep.dtype != torch.bool:
            raise ValueError(f"tt_contract: {name} must be a bool mask (True keeps), got {keep.dtype}")
    if not isinstance(scale, Tensor):
        check_number("tt_contract", "scale", scale)
    elif scale.numel() != 1:
        raise ValueError(
            f"tt_contract: scale must be a number or a tensor of one element, got shape {list(scale.shape)}"
        )
    for other in (keep_C, keep_V, scale):
        if isinstance(other, Tensor) and other.device != C.device:
            raise RuntimeError(f"tt_contract: all tensors must be on one device, got {C.device} and {other.device}")
    chosen = resolve("tt_contract", backend, C, V)
    if isinstance(scale, Tensor):
        C, scale = C * scale.to(C.dtype).reshape(()), 1.0
    if chosen is Backend.REFERENCE:
        return reference.tt_contract(C, V, keep_C, keep_V, scale)
    return _TTContract.apply(C, V, keep_C, keep_V, scale, chosen)


class _TTContract(torch.autograd.Function):
    """Define the autograd of tt_contract for all backends."""

    @staticmethod
    def forward(
        ctx: Any,
        C: Tensor,
        V: Tensor,
        keep_C: Tensor | None,
        keep_V: Tensor | None,
        scale: float,
        backend: Backend,
    ) -> Tensor:
        ctx.save_for_backward(C, V, keep_C, keep_V)
        ctx.scale, ctx.backend = scale, backend
        with no_autocast(C.device):
            return _FORWARD[backend](C, V, keep_C, keep_V, scale)

    @staticmethod
    def backward(ctx: Any, dG: Tensor) -> tuple[Tensor | None, ...]:
        need_dC, need_dV = ctx.needs_input_grad[:2]
        with no_autocast(dG.device):
            if torch.is_grad_enabled():  # this backward pass will be differentiated
                C, V, keep_C, keep_V = ctx.saved_tensors
                dC, dV = reference.tt_contract_bwd(dG, C, V, keep_C, keep_V, ctx.scale)
            else:
                dC, dV = _BACKWARD[ctx.backend](dG, *ctx.saved_tensors, ctx.scale, need_dC, need_dV)
        return dC if need_dC else None, dV if need_dV else None, None, None, None, None
