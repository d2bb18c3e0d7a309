"""Run tt_mlp with the kernels of its two layers, one layer after the other.

In the forward pass, one launch computes the norm and h1, a second one computes z, a third one computes gelu(z) and h2,
and a fourth one computes y. In the backward pass, the launch that computes the gradient of gelu(z) also multiplies this
gradient by the slope of the GELU. Therefore the backward pass of the GELU has no launch of its own.

With the environment variable ``EFFT_SM90_GENERATION`` set to 2 or 3, the sums over tokens of both layers share their
launches. This has not run on a GPU yet and is therefore not the default.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from efft_kernels._mlp import Layers, mlp_forward
from efft_kernels.eager import layer_norm_bwd
from efft_kernels.measured import KERNELS
from efft_kernels.triton import tt_gelu_linear, tt_linear, tt_norm_linear
from efft_kernels.triton.tt_linear import sums_over_tokens

_LAYERS = Layers(
    *(tt_linear.tt_linear_fwd, tt_linear.tt_linear_bwd),
    *(tt_norm_linear.tt_norm_linear_fwd, tt_norm_linear.tt_norm_linear_bwd),
    *(tt_gelu_linear.tt_gelu_linear_fwd, tt_gelu_linear.tt_gelu_linear_bwd),
)


def tt_mlp_fwd(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return mlp_forward(_LAYERS, x, *rest)


def tt_mlp_bwd(
    gy: Tensor,  # [tokens, d_out]
    x: Tensor,  # [tokens, d_in]
    z: Tensor,  # [tokens, d_hidden]
    gamma: Tensor | None,  # [d_in]
    beta: Tensor | None,  # [d_in]
    eps: float | None,
    mean: Tensor,  # [tokens]
    rstd: Tensor,  # [tokens]
    W1: Tensor | None,  # [d_hidden, d_in]
    W2: Tensor | None,  # [d_out, d_hidden]
    h1: Tensor | None,  # [tokens, r1]
    h2: Tensor | None,  # [tokens, r1]
    D1: Tensor,  # [d_in, r1]
    G1: Tensor,  # [r1, d_hidden]
    D2: Tensor,  # [d_hidden, r1]
    G2: Tensor,  # [r1, d_out]
    approximate: str,
    need_dx: bool,
    need_dD1: bool,
    need_dG1: bool,
    need_db1: bool,
    need_dD2: bool,
    need_dG2: bool,
    need_db2: bool,
    need_dgamma: bool,
    need_dbeta: bool,
) -> tuple[Tensor, ...]:
    needs, needs1 = (need_dx, need_dgamma, need_dbeta), (need_dD1, need_dG1, need_db1)
    dz, second = tt_gelu_linear.multiply_backward(
        *(gy, z, W2, h2, D2, G2, approximate), any(needs) or any(needs1), need_dD2, need_dG2, need_db2
    )
    if eps is None:
        dx, first = tt_linear.multiply_backward(dz, x, W1, h1, D1, G1, need_dx, *needs1)
        dgamma, dbeta = (x.new_empty(0) for _ in range(2))
    else:
        dn, first = tt_norm_linear.multiply_backward(
            *(dz, x, gamma, beta, mean, rstd, W1, h1, D1, G1), any(needs), *needs1
        )
        dx, dgamma, dbeta = layer_norm_bwd(dn, x, gamma, beta, mean, rstd, *needs)
    layers = (first, D1, G1), (second, D2, G2)
    if KERNELS > 1:
        of_first, of_second = sums_over_tokens(*layers)
    else:
        of_first, of_second = (sums_over_tokens(layer)[0] for layer in layers)
    return dx, *of_first, *of_second, dgamma, dbeta
