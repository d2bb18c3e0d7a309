"""Implement FacT-TT (arXiv 2212.03145): ``ΔW[l, m] = s · U C[l, m] V`` for the 12 matrices d x d of each ViT block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from efft.methods.base import BlockBank, Layer, MethodConfig, uniform, zeros


class FacTTTBank(BlockBank):
    """Hold U ``[d, r]``, C ``[n_blocks, n_matrices, r, r]`` and V ``[r, d]``.

    These are 2 d r + 12 L r² parameters for a ViT of L blocks. V starts at zero. U and the cores are initialized like
    the linear layers in the authors' code, where the cores of fc2 form one layer with 4 r inputs.
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
    """Configure factor-tuning in the tensor-train form, without the authors' dropout of rank-r activations."""

    method = "fact_tt"
    paper = "2212.03145"
    bank = FacTTTBank
