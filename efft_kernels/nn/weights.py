"""Frozen weights that are no plain dense tensors: quantised ones, as torchao's, and other wrapper subclasses."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from efft_kernels.ops import tt_linear


def is_plain(weight: Tensor) -> bool:
    """Whether the entries of ``weight`` are in its memory as its dtype says, so that a kernel can read them."""
    return not hasattr(type(weight), "__tensor_flatten__")  # what torch's own is_traceable_wrapper_subclass looks for


def adapted_linear(
    x: Tensor,  # [..., d_in]
    W: Tensor,  # [d_out, d_in]
    b: Tensor | None,  # [d_out]
    D: Tensor,  # [d_in, r1]
    G: Tensor,  # [r1, d_out]
) -> Tensor:  # [..., d_out]
    """:func:`efft_kernels.tt_linear` for any frozen weight.

    One that is not plain computes its own product, in its own way and dtype; the update is added to it, computed in the
    dtype of ``x`` (autocast's under autocast) and without ever building ``D G``. Differentiable in ``x``, ``D``, ``G``.
    """
    if is_plain(W):
        return tt_linear(x, W, b, D, G)
    return F.linear(x, W, b) + (x @ D.to(x.dtype)) @ G.to(x.dtype)


def dequantized(weight: Tensor) -> Tensor:
    """The dense values of ``weight`` ``[d_out, d_in]`` in its dtype; a plain weight itself.

    Raises:
        TypeError: a subclass that has no ``dequantize``.
    """
    if is_plain(weight):
        return weight
    try:
        dense = weight.dequantize()
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        raise TypeError(
            f"expected a weight that dequantize() makes dense, as torchao's, got a {type(weight).__name__}: {error}"
        ) from None
    return dense.to(weight.dtype)
