"""LoTR (arXiv 2402.01376): ``ΔW[l] = s · U C[l] V``, U and V shared by the layers of a role."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from efft.methods.base import Layer, MethodConfig, StackedBank, zeros


class LoTRBank(StackedBank):
    """U ``[d_in, r]`` and V ``[r, d_out]`` from N(0, 1), C ``[n, r, r]``, zero: r (d_in + d_out) + n r² parameters."""

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
    """Low tensor rank adaptation, Tucker-2 form. The authors' s is alpha / r."""

    method = "lotr"
    paper = "2402.01376"
    bank = LoTRBank
