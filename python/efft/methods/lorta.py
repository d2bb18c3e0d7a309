"""Implement LoRTA (arXiv 2410.04060): one CP decomposition of the updates of all matrices of all blocks.

Its modes (dimensions) are the input, the output, the heads, the blocks and the matrices of a block. The heads divide
either the input or the output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from efft.methods.base import BlockBank, HeadedConfig, Layer, heads_of, uniform, zeros
from efft_kernels.nn.operands import column_blocks, row_blocks


class LoRTABank(BlockBank):
    """Hold the factors of one CP decomposition of all updates ``ΔW[l, m]`` (where ``y = x ΔW``).

    If the heads divide the input, ``ΔW[l, m]`` has the block of rows ``s · (A diag(c_l ∘ c_m ∘ c_h) B)ᵀ`` for each head
    h. If they divide the output, it has the column block ``s · A diag(c_l ∘ c_m ∘ c_h) B`` for each head h. These are
    r (d + d/H + L + M + H) parameters for L blocks of M matrices with H heads.

    A ``[d, r]`` and the vectors c_l, c_m and c_h (rows ``[., r]`` of C_l, C_m and C_h) start Kaiming-uniform. B
    ``[r, d/H]`` starts at zero.
    """

    def __init__(self, config: LoRTAConfig, layers: list[Layer], **kw: Any) -> None:
        super().__init__(config, layers, **kw)
        self.heads_on = config.heads_on
        r, heads = config.rank, heads_of(config.heads, layers, self.d)
        self.A = uniform(self.d, r, bound=r**-0.5, **kw)
        self.C_l = uniform(self.n_blocks, r, bound=r**-0.5, **kw)
        self.C_m = uniform(self.n_matrices, r, bound=r**-0.5, **kw)
        self.C_h = uniform(heads, r, bound=r**-0.5, **kw)
        self.B = zeros(r, self.d // heads, **kw)

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return A, the diagonal cores of blocks and matrices, and B with the cores of the heads."""
        C, of_heads = torch.diag_embed(self.C_l[:, None] * self.C_m), torch.diag_embed(self.C_h)
        if self.heads_on == "output":
            return self.A, C, column_blocks(of_heads, self.B)
        return row_blocks(self.B.t(), of_heads), C, self.A.t()


@dataclass
class LoRTAConfig(HeadedConfig):
    """Configure low-rank tensor adaptation. The authors adapt q, k, v and o (``targets="mhsa"``)."""

    method = "lorta"
    paper = "2410.04060"
    bank = LoRTABank
    meant_before: ClassVar[Mapping[str, Any]] = {**HeadedConfig.meant_before, "heads_on": "output"}

    heads_on: Literal["input", "output"] = "input"
    """The side of a matrix that the heads divide. It is ``"input"`` in the authors' code, which multiplies by the
    transposed tensor, and ``"output"`` in their formula."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(self.heads_on in ("input", "output"), "heads_on", "'input' or 'output'", self.heads_on)
