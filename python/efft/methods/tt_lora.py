"""Implement TT-LoRA (arXiv 2408.01008): each update is a tensor train over factors of the input and output sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from efft.methods.base import Layer, MethodConfig, StackedBank
from efft.methods.factorize import MOST_FACTORS, factorize, train_ranks
from efft_kernels import tt_chain


class TTLoRABank(StackedBank):
    """Hold cores ``[n, r_{k-1}, n_k, r_k]`` for the factors of d_in = m_1 m_2 ... and d_out = n_1 n_2 ....

    The inner ranks are r. Each layer has the sum of ``r_{k-1} n_k r_k`` parameters. The chain is cut between input and
    output into ``ΔW = s · A B``. As in the authors' code, the indices of the input run in reverse order. The last core
    starts at zero, and all others start from N(0, 1/r).
    """

    def __init__(self, config: TTLoRAConfig, layers: list[Layer], **kw: Any) -> None:
        super().__init__(config, layers, **kw)
        sizes = factorize(self.d_in, config.n_factors), factorize(self.d_out, config.n_factors)
        self.n_inputs = len(sizes[0])
        ranks = train_ranks(len(sizes[0]) + len(sizes[1]), config.rank)
        self.cores = nn.ParameterList(
            torch.empty(self.n, a, size, b, **kw).normal_(std=config.rank**-0.5)
            for (a, b), size in zip(ranks, sizes[0] + sizes[1], strict=True)
        )
        nn.init.zeros_(self.cores[-1])

    def operands(self) -> tuple[Tensor, Tensor]:
        """Return D, the product of the input cores, and G, s times the product of the output cores."""
        cores = list(self.cores)
        A = tt_chain(cores[: self.n_inputs], "left", order="F")
        return A, self.scale * tt_chain(cores[self.n_inputs :], "right")


@dataclass
class TTLoRAConfig(MethodConfig):
    """Configure tensor-train low-rank adaptation."""

    method = "tt_lora"
    paper = "2408.01008"
    bank = TTLoRABank

    n_factors: int = 3
    """Number of factors into which each size is split."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_sizes("n_factors", largest=MOST_FACTORS)
