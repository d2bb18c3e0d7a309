"""Implement VeRA (arXiv 2310.11454): ``ΔW = s · A diag(λ_d) B diag(λ_b)``, where A and B are random and frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from efft.methods.base import Layer, MethodConfig, StackedBank, zeros


class VeRABank(StackedBank):
    """Hold the frozen A ``[d_in, r]`` and B ``[r, d_out]``, and the trained vectors of n layers.

    The trained parameters are lambda_d ``[n, r]`` and lambda_b ``[n, d_out]``, which starts at zero: r + d_out per
    layer. All layers of the bank share A and B, which are Kaiming-uniform as in ``peft`` (where layers of all shapes
    share one pair). A and B are saved with the adapter, because another machine may not draw the same numbers.
    """

    A: Tensor
    B: Tensor

    def __init__(self, config: VeRAConfig, layers: list[Layer], **kw: Any) -> None:
        super().__init__(config, layers, **kw)
        r = config.rank
        for name, shape, fan_in in (("A", (self.d_in, r), self.d_in), ("B", (r, self.d_out), r)):
            bound = (6 / fan_in) ** 0.5
            self.register_buffer(name, torch.empty(shape, **kw).uniform_(-bound, bound))
        self.lambda_d = nn.Parameter(torch.full((self.n, r), float(config.d_initial), **kw))
        self.lambda_b = zeros(self.n, self.d_out, **kw)

    def operands(self) -> tuple[Tensor, Tensor]:
        """Return D = A, which all layers share, and G = s diag(λ_d) B diag(λ_b)."""
        return self.A, self.scale * self.lambda_d[:, :, None] * self.B * self.lambda_b[:, None, :]


@dataclass
class VeRAConfig(MethodConfig):
    """Configure vector-based random matrix adaptation."""

    method = "vera"
    paper = "2310.11454"
    bank = VeRABank
    training_only = MethodConfig.training_only | {"d_initial"}

    rank: int = 256
    """The rank r of the frozen matrices. It can be large, because it adds only r parameters per layer."""

    d_initial: float = 0.1
    """Initial value of lambda_d."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_numbers("d_initial")
