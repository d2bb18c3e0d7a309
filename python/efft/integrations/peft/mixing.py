"""The weighted sum of adapters as one more adapter, exactly, at the rank of all together."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from efft.integrations.peft.config import EfftPeftConfig
from efft_kernels import TTFactors


def mixed_config(adapters: Sequence[str], configs: dict[str, EfftPeftConfig], banks: Any) -> EfftPeftConfig:
    """The settings of the sum of these adapters.

    Raises:
        ValueError: adapters whose factors cannot stand beside each other; it says why.
    """
    first, groups = configs[adapters[0]], banks[adapters[0]]
    for name in adapters:
        shapes = {group: _outer(bank) for group, bank in banks[name].items()}
        if shapes != {group: _outer(bank) for group, bank in groups.items()}:
            raise ValueError(
                f"adapters {adapters[0]!r} and {name!r} adapt other layers, or share factors between them otherwise: "
                "add them up while the model runs, model.base_model.set_adapter([...])"
            )
        if configs[name].modules_to_save or configs[name].bias != "none":
            raise ValueError(f"adapter {name!r} has modules or biases of its own, which cannot be added up")
        if configs[name].core_sharing == "shared" and configs[name].trainable_scale == "matrix":
            raise ValueError(f"adapter {name!r} shares cores that each layer scales: a sum has no scales of its own")
        if configs[name].rank_pattern:
            raise ValueError(f"adapter {name!r} has a rank_pattern: expected adapters of one rank for each group")
    config = copy.copy(first)
    config.trainable_scale, config.scale, config.init_weights = False, 1.0, True
    config.rank = {
        group: (sum(banks[name][group].r1 for name in adapters), sum(banks[name][group].r2 for name in adapters))
        for group in groups
    }
    return config


@torch.no_grad()
def fill(bank: TTFactors, parts: Sequence[TTFactors], weights: Sequence[float]) -> None:
    """``U = [U_1 | U_2 | ...]``, ``V = [V_1; V_2; ...]`` and on the diagonal of each core those of the parts, times
    their scales and weights."""
    bank.U.copy_(torch.cat([part.U for part in parts], 1))
    bank.V.copy_(torch.cat([part.V for part in parts], 0))
    bank.C.zero_()
    row = column = 0
    for part, weight in zip(parts, weights, strict=True):
        core = _scale_cores(part) * weight
        bank.C[..., row : row + part.r1, column : column + part.r2] = core
        row, column = row + part.r1, column + part.r2


def _outer(bank: TTFactors) -> tuple[Any, ...]:
    """What banks must have in common."""
    return bank.d_in, bank.d_out, bank.C.shape[:2], [binding.site for binding in bank.bindings]


def _scale_cores(bank: TTFactors) -> Tensor:
    """The cores with the scale in them."""
    scale = bank.scale
    return bank.C * (scale[..., None, None] if isinstance(scale, Tensor) else scale)
