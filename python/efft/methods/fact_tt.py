"""FacT-TT (arXiv 2212.03145): ``ΔW[l, m] = s · U C[l, m] V`` for 12 matrices d x d of each block of a ViT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from efft.methods.base import BlockBank, Layer, MethodConfig, uniform, zeros


class FacTTTBank(BlockBank):
    """U ``[d, r]``, C ``[n_blocks, n_matrices, r, r]``, V ``[r, d]``, zero: 2 d r + 12 L r² parameters.

    U and the cores start as the linear layers of the authors' code do, whose fc2 has one core of 4 r inputs.
    """

    def __init__(self, config: FacTTTConfig, layers: list[Layer], **kw: Any) -> None:
        super().__init__(config, layers, **kw)
        r = config.rank
        self.U = uniform(self.d, r, bound=self.d**-0.5, **kw)
        cores = torch.empty(self.n_blocks, self.n_matrices, r, r, **kw)
        for site in self.sites("", layers).values():
            bound = ((site.last - site.first) * r if site.rows else r) ** -0.5
            cores[site.block, site.first : site.last].uniform_(-bound, bound)
        self.C = nn.Parameter(cores)
        self.V = zeros(r, self.d, **kw)

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return U, C and V."""
        return self.U, self.C, self.V


@dataclass
class FacTTTConfig(MethodConfig):
    """Factor-tuning, tensor-train form. (The authors drop activations of rank r; here is no dropout.)"""

    method = "fact_tt"
    paper = "2212.03145"
    bank = FacTTTBank
