"""LoRETTA_rep (arXiv 2402.11417): LoRA whose A and B are tensor trains, ``ΔW = s · A B``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from efft.methods.base import Layer, MethodConfig, StackedBank
from efft.methods.factorize import factorize, train_ranks
from efft_kernels import tt_chain


class LoRETTARepBank(StackedBank):
    """Cores ``[n, r_{k-1}, n_k, r_k]`` of A (d_in = m_1 m_2 ..., then the bottleneck) and of B (the bottleneck, then
    d_out = n_1 n_2 ...), inner ranks r: the sum of ``r_{k-1} n_k r_k`` parameters a layer.

    All cores start from N(0, 1/r), the last of B at zero, so that ΔW is zero. (In the authors' code this is commented
    out, and training starts from another model than the base.)
    """

    def __init__(self, config: LoRETTARepConfig, layers: list[Layer], **kw: Any) -> None:
        super().__init__(config, layers, **kw)
        down = [*factorize(self.d_in, config.n_factors), config.bottleneck]
        up = [config.bottleneck, *factorize(self.d_out, config.n_factors)]
        self.down, self.up = (
            nn.ParameterList(
                torch.empty(self.n, a, size, b, **kw).normal_(std=config.rank**-0.5)
                for (a, b), size in zip(train_ranks(len(sizes), config.rank), sizes, strict=True)
            )
            for sizes in (down, up)
        )
        nn.init.zeros_(self.up[-1])

    def operands(self) -> tuple[Tensor, Tensor]:
        """D = A, G = s B."""
        (*inputs, last), (first, *outputs) = self.down, self.up
        A = tt_chain(inputs, "left") @ last.squeeze(-1)
        return A, self.scale * (first.squeeze(-3) @ tt_chain(outputs, "right"))


@dataclass
class LoRETTARepConfig(MethodConfig):
    """Low-rank economic tensor-train adaptation by reparametrisation. The authors' s is alpha / bottleneck.

    (LoRETTA_adp puts a nonlinearity between two such trains: it is no update of a weight, and not here.)
    """

    method = "loretta_rep"
    paper = "2402.11417"
    bank = LoRETTARepBank

    rank: int = 5
    """TT rank r."""

    bottleneck: int = 8
    """Width between A and B."""

    n_factors: int = 3
    """Numbers that each of d_in and d_out is factored into."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bottleneck", "n_factors"):
            value = getattr(self, name)
            self._check(type(value) is int and value >= 1, name, "an integer >= 1", value)
