"""Implement LoRA (arXiv 2106.09685): ``ΔW = s · A B``, where each layer has its own A and B."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from efft.methods.base import Layer, MethodConfig, StackedBank, uniform, zeros
from efft.planning.extras import Extras


class LoRABank(StackedBank):
    """Hold A ``[n, d_in, r]`` and B ``[n, r, d_out]``: r (d_in + d_out) parameters per layer.

    A starts Kaiming-uniform, as in ``peft``, and B starts at zero.
    """

    def __init__(self, config: LoRAConfig, layers: list[Layer], **kw: Any) -> None:
        super().__init__(config, layers, **kw)
        self.A = uniform(self.n, self.d_in, config.rank, bound=self.d_in**-0.5, **kw)
        self.B = zeros(self.n, config.rank, self.d_out, **kw)

    def operands(self) -> tuple[Tensor, Tensor]:
        """Return D = A and G = s B."""
        return self.A, self.scale * self.B


@dataclass
class LoRAConfig(MethodConfig):
    """Configure low-rank adaptation.

    As in ``peft``, a fused qkv is one matrix. The scale s corresponds to ``lora_alpha / r`` in ``peft``.
    """

    method = "lora"
    paper = "2106.09685"
    bank = LoRABank
    meant_before: ClassVar[Mapping[str, Any]] = {**MethodConfig.meant_before, **Extras().as_fields()}

    bias: Literal["none", "all", "adapted", "auto"] = "none"
    """Biases that are trained and saved in addition to the factors, as in :class:`efft.EfftConfig`."""

    norms: bool = False
    """Whether the weights and biases of all normalization layers are trained and saved in addition to the factors."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_extras(self.bias, self.norms)

    @property
    def extras(self) -> Extras:
        return Extras(self.bias, self.norms)
