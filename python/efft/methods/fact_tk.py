"""FacT-TK (arXiv 2212.03145): FacT-TT whose cores are a Tucker-3 product, ``C[l, m] = K ×₃ P[:, l, m]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from efft.methods.base import BlockBank, Layer, MethodConfig, uniform, zeros


class FacTTKBank(BlockBank):
    """U ``[d, r]``, V ``[r, d]``, zero, K ``[r, r, r]``, P ``[r, n_blocks, n_matrices]``: 2 d r + 12 L r + r³ in all.

    K and P start Xavier-uniform (with the fans that torch takes from their layouts in the authors' code).
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
    """Factor-tuning, Tucker form, by the formula of the paper.

    The authors' code reshapes ``K ×₃ P`` for fc1 and fc2 in a way that mixes the indices of block and rank; it has the
    same number of parameters, but other updates.
    """

    method = "fact_tk"
    paper = "2212.03145"
    bank = FacTTKBank
