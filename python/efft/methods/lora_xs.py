"""Implement LoRA-XS (arXiv 2405.17604): ``ΔW = s · A R B``, where A and B are frozen and come from the layer's weight.

They contain the leading singular vectors of the weight. R is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from efft.methods.base import Layer, MethodConfig, StackedBank, zeros


class LoRAXSBank(StackedBank):
    """Hold the frozen A ``[n, d_in, r]`` and B ``[n, r, d_out]``, and the trained R ``[n, r, r]``.

    Each layer has r² trained parameters. With ``Wᵀ = P diag(σ) Q`` (W is ``[d_out, d_in]``, σ in descending order), A
    consists of the first r columns of P diag(σ), and B of the first r rows of Q, as in the authors' code. The signs of
    singular vectors are not determined, so the adapter's file also contains A and B. In files of earlier versions, B
    contains the singular values instead of A, and loading keeps this. R starts at zero. The authors draw R from
    N(0, 1e-10), which gives nearly the same gradient.
    """

    A: Tensor
    B: Tensor

    def __init__(self, config: LoRAXSConfig, layers: list[Layer], **kw: Any) -> None:
        super().__init__(config, layers, **kw)
        r = config.rank
        if r > min(self.d_in, self.d_out):
            raise ValueError(
                f"LoRAXSConfig.rank must be at most the smaller size of every layer, got {r}, but "
                f"{layers[0].target.name!r} is {self.d_in}x{self.d_out}"
            )
        self.register_buffer("A", torch.empty(self.n, self.d_in, r, **kw))
        self.register_buffer("B", torch.empty(self.n, r, self.d_out, **kw))
        self.R = zeros(self.n, r, r, **kw)
        if not self.A.is_meta:
            for i, layer in enumerate(layers):
                W = layer.matrix().to(self.A.dtype)
                P, sigma, Q = torch.linalg.svd(W.t(), full_matrices=False)
                self.A[i], self.B[i] = P[:, :r] * sigma[:r], Q[:r]

    def operands(self) -> tuple[Tensor, Tensor]:
        """Return D = A and G = s R B."""
        return self.A, self.scale * (self.R @ self.B)


@dataclass
class LoRAXSConfig(MethodConfig):
    """Configure low-rank adaptation with an extremely small number of parameters."""

    method = "lora_xs"
    paper = "2405.17604"
    bank = LoRAXSBank
