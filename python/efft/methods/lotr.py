"""Implement LoTR (arXiv 2402.01376): ``ΔW[l] = s · U C[l] V``, where all layers with the same role share U and V."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from efft.methods.base import Layer, MethodConfig, StackedBank, zeros


class LoTRBank(StackedBank):
    """Hold U ``[d_in, r]``, V ``[r, d_out]`` and C ``[n, r, r]``: r (d_in + d_out) + n r² parameters.

    U and V start from N(0, 1), and C starts at zero.
    """

    def __init__(self, config: LoTRConfig, layers: list[Layer], **kw: Any) -> None:
        super().__init__(config, layers, **kw)
        r = config.rank
        self.U = nn.Parameter(torch.empty(self.d_in, r, **kw).normal_())
        self.C = zeros(self.n, r, r, **kw)
        self.V = nn.Parameter(torch.empty(r, self.d_out, **kw).normal_())

    def operands(self) -> tuple[Tensor, Tensor]:
        """Return D = U, which all layers share, and G = s C V."""
        return self.U, self.scale * (self.C @ self.V)


@dataclass
class LoTRConfig(MethodConfig):
    """Configure low tensor rank adaptation in the Tucker-2 form. The authors' s is alpha / r."""

    method = "lotr"
    paper = "2402.01376"
    bank = LoTRBank
