"""Run tt_linear with one adapter per sample: two launches compute h and y with the factors of each sample's adapter."""

from __future__ import annotations

from torch import Tensor

from efft_kernels.triton.lowrank_gemm import lowrank_gemm


def tt_linear_grouped(
    x: Tensor,  # [samples, tokens, d_in]
    W: Tensor,  # [d_out, d_in]
    b: Tensor | None,  # [d_out]
    D: Tensor,  # [n_adapters, d_in, r1]
    G: Tensor,  # [n_adapters, r1, d_out]
    adapter: Tensor,  # [samples], negative for no adapter
) -> Tensor:  # [samples, tokens, d_out]
    return lowrank_gemm(x, W.t(), b, D, G, adapter=adapter.contiguous())[0]
