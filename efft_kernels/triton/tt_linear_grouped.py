"""Run tt_linear with one adapter per sample: two launches compute h and y with the factors of each sample's adapter.

In the backward pass, the same two kernels compute dh and dx, and batched products of torch compute the sums over
tokens (dD, dG and db).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from efft_kernels import eager
from efft_kernels._arguments import transposed
from efft_kernels.triton.lowrank_gemm import lowrank_gemm


def tt_linear_grouped(*operands: Tensor | None) -> Tensor:
    return tt_linear_grouped_fwd(*operands)[0]  # type: ignore[arg-type]  # the schema of the op checks them


def tt_linear_grouped_fwd(
    x: Tensor,  # [samples, tokens, d_in]
    W: Tensor,  # [d_out, d_in]
    b: Tensor | None,  # [d_out]
    D: Tensor,  # [n_adapters, d_in, r1]
    G: Tensor,  # [n_adapters, r1, d_out]
    adapter: Tensor,  # [samples], negative for no adapter
) -> tuple[Tensor, Tensor]:  # y [samples, tokens, d_out], h [samples, tokens, r1]
    return lowrank_gemm(x, transposed(W), b, D, G, adapter=adapter.contiguous())


def tt_linear_grouped_bwd(gy: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients with :func:`efft_kernels.eager.grouped_backward`."""
    return eager.grouped_backward(tt_linear_grouped_fwd, gy, *rest)
