"""Implement FacT-TK (arXiv 2212.03145): FacT-TT whose cores are a Tucker-3 product, ``C[l, m] = K ×₃ P[:, l, m]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from efft.methods.base import BlockBank, Layer, MethodConfig, uniform, zeros


class FacTTKBank(BlockBank):
    """Hold U ``[d, r]``, V ``[r, d]``, K ``[r, r, r]`` and P ``[r, n_blocks, n_matrices]``.

    These are 2 d r + 12 L r + r³ parameters for a ViT of L blocks. V starts at zero. K and P start Xavier-uniform, with
    the fans that torch derives from their layouts in the authors' code.
    """

    def __init__(self, config: FacTTKConfig, layers: list[Layer], **kw: Any) -> None:
        super().__init__(config, layers, **kw)
        r, n = config.rank, self.n_blocks * self.n_matrices
        self.U = uniform(self.d, r, bound=self.d**-0.5, **kw)
        self.K = uniform(r, r, r, bound=(6 / (2 * r * r)) ** 0.5, **kw)
        self.P = uniform(r, self.n_blocks, self.n_matrices, bound=(6 / (r + n)) ** 0.5, **kw)
        self.V = zeros(r, self.d, **kw)

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return U, the product of K and P, and V."""
        return self.U, torch.einsum("abp,plm->lmab", self.K, self.P), self.V


@dataclass
class FacTTKConfig(MethodConfig):
    """Configure factor-tuning in the Tucker form, according to the formula in the paper.

    For fc1 and fc2, the authors' code reshapes ``K ×₃ P`` in a way that mixes the indices of block and rank. With the
    same number of parameters, that code computes other updates.
    """

    method = "fact_tk"
    paper = "2212.03145"
    bank = FacTTKBank
