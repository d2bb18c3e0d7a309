"""Define ``expert_mm``, which multiplies the rows of every expert by that expert's matrix.

On GPUs of compute capability 8.0 and newer, ``F.grouped_mm`` computes the products for bfloat16, float16 and float32;
in compiled code, it does so only for bfloat16. ``F.grouped_mm`` needs row sizes that are multiples of 16 bytes, so the
operands are padded to such sizes. In all other cases, including the CPU, an op of this module multiplies one expert
after another. A second op of this module computes the gradient of the matrices.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def expert_mm(x: Tensor, W: Tensor, offsets: Tensor) -> Tensor:
    """Compute ``y[i] = x[i] W[e]`` for every expert e and its rows i, ``offsets[e - 1] <= i < offsets[e]``.

    Args:
        x: ``[rows, d_in]``, sorted by expert.
        W: ``[experts, d_in, d_out]`` in the dtype of ``x``, with any strides.
        offsets: int32 ``[experts]``, the end of each expert's rows. Rows after the last end belong to no expert.

    Returns:
        ``y [rows, d_out]`` in the dtype of ``x``, differentiable any number of times with respect to ``x`` and ``W``.
        The values of rows that belong to no expert are undefined.
    """
    if _has_kernel(x) and len(x) > 0:
        step = 16 // x.element_size()
        missing_in, missing_out = -x.shape[1] % step, -W.shape[2] % step
        if missing_in or missing_out:
            x, W = F.pad(x, (0, missing_in)), F.pad(W, (0, missing_out, 0, missing_in))
        y = F.grouped_mm(x.contiguous(), W, offs=offsets)
        return y[:, : y.shape[1] - missing_out] if missing_out else y
    product: Tensor = _by_expert(x, W, offsets)
    return product


def _has_kernel(x: Tensor) -> bool:
    """Return whether ``F.grouped_mm`` supports operands of this dtype on this device."""
    if x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    dtypes = (torch.bfloat16,) if torch.compiler.is_compiling() else (torch.bfloat16, torch.float16, torch.float32)
    return x.dtype in dtypes


@torch.library.custom_op("efft::expert_mm", mutates_args=())
def _by_expert(x: Tensor, W: Tensor, offsets: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0], W.shape[2])
    first = 0
    for e, last in enumerate(offsets.tolist()):
        if first < last:
            torch.mm(x[first:last], W[e], out=y[first:last])
        first = last
    y[first:].zero_()
    return y


@torch.library.custom_op("efft::expert_mm_weight", mutates_args=())
def _weight_by_expert(x: Tensor, gy: Tensor, offsets: Tensor) -> Tensor:
    """Sum ``x[i]ᵀ gy[i]`` over the rows of every expert: ``[experts, d_in, d_out]``."""
    gW = x.new_zeros(offsets.shape[0], x.shape[1], gy.shape[1])
    first = 0
    for e, last in enumerate(offsets.tolist()):
        if first < last:
            torch.mm(x[first:last].t(), gy[first:last], out=gW[e])
        first = last
    return gW


@_by_expert.register_fake
def _(x: Tensor, W: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], W.shape[2])


@_weight_by_expert.register_fake
def _(x: Tensor, gy: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0], x.shape[1], gy.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    a, b, offsets = inputs
    ctx.save_for_backward(a if ctx.needs_input_grad[1] else None, b if ctx.needs_input_grad[0] else None, offsets)


def _backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
    x, W, offsets = ctx.saved_tensors
    dx = _by_expert(gy, W.transpose(1, 2), offsets) if ctx.needs_input_grad[0] else None
    dW = _weight_by_expert(x, gy, offsets) if ctx.needs_input_grad[1] else None
    return dx, dW, None


def _weight_backward(ctx: Any, gW: Tensor) -> tuple[Tensor | None, ...]:
    x, gy, offsets = ctx.saved_tensors
    dx = _by_expert(gy, gW.transpose(1, 2), offsets) if ctx.needs_input_grad[0] else None
    dgy = _by_expert(x, gW, offsets) if ctx.needs_input_grad[1] else None
    return dx, dgy, None


_by_expert.register_autograd(_backward, setup_context=_save)
_weight_by_expert.register_autograd(_weight_backward, setup_context=_save)
