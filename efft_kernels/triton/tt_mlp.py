"""Run tt_mlp with the kernels of its two layers, one layer after the other.

In the forward pass, one launch computes the norm and h1, a second one computes z, a third one computes gelu(z) and h2,
and a fourth one computes y. In the backward pass, the launch that computes the gradient of gelu(z) also multiplies this
gradient by the slope of the GELU. Therefore the backward pass of the GELU has no launch of its own.

With the environment variable ``EFFT_SM90_GENERATION`` set to 2 or 3, the sums over tokens of both layers share their
launches on GPUs of compute capability 9.0 and newer. On others, the shared kernel would spill registers in some cases.
This has not run on a GPU yet and is therefore not the default.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from efft_kernels._mlp import Layers, mlp_backward, mlp_forward
from efft_kernels.measured import KERNELS
from efft_kernels.triton.launch import device
from efft_kernels.triton.tt_gelu_linear import (
    tt_gelu_linear_bwd,
    tt_gelu_linear_fwd,
    tt_gelu_linear_multiply_backward,
)
from efft_kernels.triton.tt_linear import Pending, multiply_backward, sums_over_tokens, tt_linear_bwd, tt_linear_fwd
from efft_kernels.triton.tt_norm_linear import (
    tt_norm_linear_bwd,
    tt_norm_linear_fwd,
    tt_norm_linear_multiply_backward,
)

_LAYERS = Layers(
    tt_linear_fwd, tt_linear_bwd, tt_norm_linear_fwd, tt_norm_linear_bwd, tt_gelu_linear_fwd, tt_gelu_linear_bwd
)
#: Layers whose backward functions return one :class:`Pending` in the place of dD, dG and db.
_WITHOUT_SUMS: Layers = _LAYERS._replace(
    tt_linear_bwd=multiply_backward,
    tt_norm_linear_bwd=tt_norm_linear_multiply_backward,
    tt_gelu_linear_bwd=tt_gelu_linear_multiply_backward,
)


def tt_mlp_fwd(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return mlp_forward(_LAYERS, x, *rest)


def tt_mlp_bwd(gy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    if KERNELS == 1 or device(gy.device).capability < 9:
        return mlp_backward(_LAYERS, gy, *rest)
    found: tuple[Tensor | Pending, ...] = mlp_backward(_WITHOUT_SUMS, gy, *rest)
    sums = iter(sums_over_tokens(*[part for part in found if isinstance(part, Pending)]))
    return tuple(t for part in found for t in (next(sums) if isinstance(part, Pending) else (part,)))
