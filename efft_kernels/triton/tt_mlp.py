"""Run tt_mlp with the kernels of its two layers, one layer after the other.

In the forward pass, one launch computes the norm and h1, a second one computes z, a third one computes gelu(z) and h2,
and a fourth one computes y. In the backward pass, the launch that computes the gradient of gelu(z) also multiplies this
gradient by the slope of the GELU. Therefore the backward pass of the GELU has no launch of its own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from efft_kernels._mlp import Layers, mlp_backward, mlp_forward
from efft_kernels.triton.tt_gelu_linear import tt_gelu_linear_bwd, tt_gelu_linear_fwd
from efft_kernels.triton.tt_linear import tt_linear_bwd, tt_linear_fwd
from efft_kernels.triton.tt_norm_linear import tt_norm_linear_bwd, tt_norm_linear_fwd

_LAYERS = Layers(
    tt_linear_fwd, tt_linear_bwd, tt_norm_linear_fwd, tt_norm_linear_bwd, tt_gelu_linear_fwd, tt_gelu_linear_bwd
)


def tt_mlp_fwd(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return mlp_forward(_LAYERS, x, *rest)


def tt_mlp_bwd(gy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return mlp_backward(_LAYERS, gy, *rest)
