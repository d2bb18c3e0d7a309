"""Implement MetaTT (arXiv 2506.09105): one tensor train over input, block, matrix, head (only in 5D) and output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from efft.methods.base import BlockBank, HeadedConfig, Layer, MethodConfig, heads_of, zeros
from efft_kernels.nn.operands import column_blocks


class MetaTT4DBank(BlockBank):
    """Hold the cores of ``ΔW[l, m] = s · G1 G2[l] G3[m] G4``.

    These are 2 d r + (L + M) r² parameters for L blocks of M matrices. G1 starts at zero. The other cores start as
    identities.
    """

    def __init__(self, config: MetaTT4DConfig, layers: list[Layer], **kw: Any) -> None:
        super().__init__(config, layers, **kw)
        r = config.rank
        self.G1 = zeros(self.d, r, **kw)
        self.G2 = _identities(self.n_blocks, r, r, **kw)
        self.G3 = _identities(self.n_matrices, r, r, **kw)
        self.G4 = nn.Parameter(torch.eye(r, self.d, **kw))

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return G1 [d, r], the products G2[l] G3[m] of all blocks l and matrices m [L, M, r, r], and G4 [r, d]."""
        return self.G1, torch.einsum("lab,mbc->lmac", self.G2, self.G3), self.G4


class MetaTT5DBank(BlockBank):
    """Hold the cores of ``ΔW[l, m]``, which has the column block ``s · G1 G2[l] G3[m] G4[h] G5`` for each head h.

    These are (d + d/H) r + (L + M + H) r² parameters for L blocks of M matrices with H heads. G1 starts at zero. The
    other cores start as identities.
    """

    def __init__(self, config: MetaTT5DConfig, layers: list[Layer], **kw: Any) -> None:
        super().__init__(config, layers, **kw)
        r, heads = config.rank, heads_of(config.heads, layers, self.d)
        self.G1 = zeros(self.d, r, **kw)
        self.G2 = _identities(self.n_blocks, r, r, **kw)
        self.G3 = _identities(self.n_matrices, r, r, **kw)
        self.G4 = _identities(heads, r, r, **kw)
        self.G5 = nn.Parameter(torch.eye(r, self.d // heads, **kw))

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return G1 [d, r], the products G2[l] G3[m] of all blocks l and matrices m [L, M, r, r], and a tensor [r, d].

        The last tensor has a column block G4[h] G5 for each head h.
        """
        C = torch.einsum("lab,mbc->lmac", self.G2, self.G3)
        return self.G1, C, column_blocks(self.G4, self.G5)


@dataclass
class MetaTT4DConfig(MethodConfig):
    """Configure a global tensor train without a mode (a dimension) for heads."""

    method = "metatt_4d"
    paper = "2506.09105"
    bank = MetaTT4DBank


@dataclass
class MetaTT5DConfig(HeadedConfig):
    """Configure a global tensor train with a mode (a dimension) for heads."""

    method = "metatt_5d"
    paper = "2506.09105"
    bank = MetaTT5DBank


def _identities(n: int, *shape: int, **kw: Any) -> nn.Parameter:
    return nn.Parameter(torch.eye(*shape, **kw).repeat(n, 1, 1))
