"""LoRA (arXiv 2106.09685): ``ΔW = s · A B``, both of each layer's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from efft.methods.base import Layer, MethodConfig, StackedBank, uniform, zeros


class LoRABank(StackedBank):
    """A ``[n, d_in, r]``, Kaiming-uniform as in ``peft``, and B ``[n, r, d_out]``, zero: r (d_in + d_out) a layer."""

    def __init__(self, config: LoRAConfig, layers: list[Layer], **kw: Any) -> None:
        super().__init__(config, layers, **kw)
        self.A = uniform(self.n, self.d_in, config.rank, bound=self.d_in**-0.5, **kw)
        self.B = zeros(self.n, config.rank, self.d_out, **kw)

    def operands(self) -> tuple[Tensor, Tensor]:
        """D = A, G = s B."""
        return self.A, self.scale * self.B


@dataclass
class LoRAConfig(MethodConfig):
    """Low-rank adaptation. A fused qkv is one matrix, as in ``peft``; s is ``lora_alpha / r`` there."""

    method = "lora"
    paper = "2106.09685"
    bank = LoRABank
