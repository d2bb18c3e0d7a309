"""LoRTA (arXiv 2410.04060): one CP decomposition over input, output within a head, heads, layers and matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from efft.methods.base import BlockBank, HeadedConfig, Layer, heads_of, uniform, zeros
from efft_kernels.nn.operands import column_blocks


class LoRTABank(BlockBank):
    """``ΔW[l, m]`` has a column block ``s · A diag(c_l ∘ c_m ∘ c_h) B`` for each head h: r (d + d/H + L + M + H)
    parameters for L blocks of M matrices with H heads.

    A ``[d, r]`` and the c_l, c_m, c_h (rows ``[., r]`` of C_l, C_m, C_h) start Kaiming-uniform, B ``[r, d/H]`` at zero.
    """

    def __init__(self, config: LoRTAConfig, layers: list[Layer], **kw: Any) -> None:
        super().__init__(config, layers, **kw)
        r, heads = config.rank, heads_of(config.heads, layers, self.d)
        self.A = uniform(self.d, r, bound=r**-0.5, **kw)
        self.C_l = uniform(self.n_blocks, r, bound=r**-0.5, **kw)
        self.C_m = uniform(self.n_matrices, r, bound=r**-0.5, **kw)
        self.C_h = uniform(heads, r, bound=r**-0.5, **kw)
        self.B = zeros(r, self.d // heads, **kw)

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Diagonal cores, and B with those of the heads."""
        C = torch.diag_embed(self.C_l[:, None] * self.C_m)
        return self.A, C, column_blocks(torch.diag_embed(self.C_h), self.B)


@dataclass
class LoRTAConfig(HeadedConfig):
    """Low-rank tensor adaptation. The authors adapt q, k, v and o (``targets="mhsa"``)."""

    method = "lorta"
    paper = "2410.04060"
    bank = LoRTABank
