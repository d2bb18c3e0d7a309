"""Implement LoRETTA (arXiv 2402.11417), in which A and B are tensor trains.

In the form "rep", A and B are the factors of LoRA. In the form "adp", they are the matrices of an adapter that follows
a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efft.methods.base import Layer, MethodConfig, MethodGroup, StackedBank, uniform, zeros
from efft.methods.factorize import MOST_FACTORS, factorize, train_ranks
from efft.planning.targets import Target
from efft_kernels import EfftLinear, tt_chain
from efft_kernels.nn.frozen import read_by_its_parent
from efft_kernels.nn.linear import frozen_linear


class LoRETTABank(StackedBank):
    """Hold the cores ``[n, r_{k-1}, n_k, r_k]`` of A and B, with inner ranks r.

    The sizes n_k of A are the factors m_1, m_2, ... of its input size, followed by the bottleneck. The sizes of B are
    the bottleneck, followed by the factors of d_out = n_1 n_2 .... Each layer has the sum of ``r_{k-1} n_k r_k``
    parameters.

    All cores start from N(0, 1/r), except the last core of B, which starts at zero, so that training starts from the
    base. (In the authors' code for rep, the line that zeroes this core is commented out. Training then starts from
    another model than the base.)

    Adapters have the biases b_A ``[n, bottleneck]``, which starts uniform, and b_B ``[n, d_out]``, which starts at zero
    (in the authors' code it starts uniform, too).
    """

    down_bias: nn.Parameter | None
    up_bias: nn.Parameter | None

    def __init__(self, config: LoRETTAConfig, layers: list[Layer], **kw: Any) -> None:
        super().__init__(config, layers, **kw)
        down = [*factorize(self.d_out if config.behind else self.d_in, config.n_factors), config.bottleneck]
        up = [config.bottleneck, *factorize(self.d_out, config.n_factors)]
        self.down, self.up = (
            nn.ParameterList(
                torch.empty(self.n, a, size, b, **kw).normal_(std=config.rank**-0.5)
                for (a, b), size in zip(train_ranks(len(sizes), config.rank), sizes, strict=True)
            )
            for sizes in (down, up)
        )
        nn.init.zeros_(self.up[-1])
        self.down_bias = self.up_bias = None
        if isinstance(config, LoRETTAAdpConfig) and config.bias:
            self.down_bias = uniform(self.n, config.bottleneck, bound=config.bottleneck**-0.5, **kw)
            self.up_bias = zeros(self.n, self.d_out, **kw)

    def operands(self) -> tuple[Tensor, Tensor]:
        """Return D = A and G = s B."""
        (*inputs, last), (first, *outputs) = self.down, self.up
        A = tt_chain(inputs, "left") @ last.squeeze(-1)
        return A, self.scale * (first.squeeze(-3) @ tt_chain(outputs, "right"))


class AdapterLinear(EfftLinear):
    """Compute ``y = z + relu(z D + b_A) G + s b_B`` with ``z = x Wᵀ + b``.

    This is an adapter after a frozen layer, not an update of the layer's weight.
    """

    factors: LoRETTABank

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        return super().refusal(layer) or read_by_its_parent(layer)

    def forward(self, x: Tensor) -> Tensor:  # [..., in_features] -> [..., out_features]
        z = frozen_linear(self, x)
        if not self.enabled:
            return z
        D, G = (operand.to(z.dtype) for operand in self.factors.down_up(self.binding))
        bank, i = self.factors, self.site
        if bank.down_bias is None or bank.up_bias is None:
            return z + F.relu(z @ D) @ G
        down, up = bank.down_bias[i].to(z.dtype), (bank.scale * bank.up_bias[i]).to(z.dtype)
        return z + F.linear(F.relu(F.linear(z, D.t(), down)), G.t(), up)

    def matrix(self, weight: Tensor) -> Tensor:
        """Raise ValueError like :meth:`evaluated`, because a product with the weight itself would miss the adapter."""
        self.evaluated()
        return weight

    def update(self, D: Tensor, G: Tensor) -> Tensor:
        """Raise ValueError like :meth:`evaluated`."""
        self.evaluated()
        return super().update(D, G)

    def evaluated(self) -> tuple[Tensor, Tensor]:
        """Raise ValueError, because an adapter with a nonlinearity is not an update that can be added to the weight."""
        raise ValueError(
            "an adapter with a nonlinearity is not an update of a weight, so it cannot be merged, shown or "
            "exported as one; use the adapted model without merging"
        )


@dataclass
class LoRETTAConfig(MethodConfig):
    """Define the fields that the configurations of both forms have."""

    paper = "2402.11417"
    bank = LoRETTABank
    behind: ClassVar[bool]
    """Whether the input of A is the output of the layer."""

    rank: int = 5
    """The rank r of the tensor trains."""

    bottleneck: int = 8
    """Width between A and B."""

    n_factors: int = 3
    """Number of factors into which each size is split."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_sizes("bottleneck")
        self._check_sizes("n_factors", largest=MOST_FACTORS)


@dataclass
class LoRETTARepConfig(LoRETTAConfig):
    """Configure low-rank economic tensor-train adaptation by reparametrization: ``ΔW = s · A B``.

    The authors' s is alpha / bottleneck.
    """

    method = "loretta_rep"
    behind = False


@dataclass
class LoRETTAAdpConfig(LoRETTAConfig):
    """Configure low-rank economic tensor-train adaptation by adapters ``z + s · (relu(z A + b_A) B + b_B)``.

    The adapters follow the attention and the MLP of every block or, if ``targets`` is a list, all listed layers. They
    cannot be merged.
    """

    method = "loretta_adp"
    kinds = frozenset({"linear"})  # an adapter with a nonlinearity can only replace an entire layer
    behind = True
    layer = AdapterLinear
    meant_before: ClassVar[Mapping[str, Any]] = {**MethodConfig.meant_before, "bias": False}

    bottleneck: int = 64
    """Width between A and B."""

    bias: bool = True
    """Whether the adapters have biases, as in the authors' code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(isinstance(self.bias, bool), "bias", "True or False", self.bias)

    def groups(self, model: nn.Module, targets: list[Target]) -> list[MethodGroup]:
        """Return the groups of the last layers of attention and MLP, or of all layers that are listed by name."""
        last = targets if isinstance(self.targets, list) else [t for t in targets if t.role in ("o", "fc2")]
        return super().groups(model, last)
