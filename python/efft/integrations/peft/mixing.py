"""Create an adapter that is exactly the weighted sum of other adapters. Its rank is the sum of their ranks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from efft.integrations.peft.config import EfftPeftConfig
from efft_kernels import TTFactors


def mixed_config(adapters: Sequence[str], configs: dict[str, EfftPeftConfig], banks: Any) -> EfftPeftConfig:
    """Return the configuration for the sum of the given adapters.

    Raises:
        ValueError: the factors of the adapters cannot be concatenated. The message gives the reason.
    """
    first, groups = configs[adapters[0]], banks[adapters[0]]
    for name in adapters:
        shapes = {group: _outer(bank) for group, bank in banks[name].items()}
        if shapes != {group: _outer(bank) for group, bank in groups.items()}:
            raise ValueError(
                f"adapters {adapters[0]!r} and {name!r} adapt different layers, or share factors differently: "
                "activate them together instead, with model.base_model.set_adapter([...])"
            )
        if configs[name].modules_to_save or configs[name].bias != "none":
            raise ValueError(f"adapter {name!r} has its own modules or biases, which cannot be added up")
        if configs[name].core_sharing == "shared" and configs[name].trainable_scale == "matrix":
            raise ValueError(f"adapter {name!r} shares cores that each layer scales, and a sum has no such scales")
        if configs[name].layer_scale is not None:
            raise ValueError(
                f"adapter {name!r} has its own diagonals (layer_scale), which shared factors cannot add up"
            )
        if configs[name].rank_pattern:
            raise ValueError(f"adapter {name!r} has a rank_pattern: expected adapters with one rank per group")
    config = copy.copy(first)
    config.trainable_scale, config.scale, config.init_weights = False, 1.0, True
    config.rank = {
        group: (sum(banks[name][group].r1 for name in adapters), sum(banks[name][group].r2 for name in adapters))
        for group in groups
    }
    return config


@torch.no_grad()
def fill(bank: TTFactors, parts: Sequence[TTFactors], weights: Sequence[float]) -> None:
    """Fill the bank of a weighted sum from the banks of its parts.

    ``U`` is ``[U_1 | U_2 | ...]`` and ``V`` is ``[V_1; V_2; ...]``. Each core is block diagonal, and its blocks are the
    cores of the parts, multiplied by their scales and by ``weights``.
    """
    bank.U.copy_(torch.cat([part.U for part in parts], 1))
    bank.V.copy_(torch.cat([part.V for part in parts], 0))
    bank.C.zero_()
    row = column = 0
    for part, weight in zip(parts, weights, strict=True):
        core = _scale_cores(part) * weight
        bank.C[..., row : row + part.r1, column : column + part.r2] = core
        row, column = row + part.r1, column + part.r2


def _outer(bank: TTFactors) -> tuple[Any, ...]:
    """Return the properties that must be equal for banks whose updates are to be added."""
    return bank.d_in, bank.d_out, bank.C.shape[:2], [binding.site for binding in bank.bindings]


def _scale_cores(bank: TTFactors) -> Tensor:
    """Return the cores multiplied by their scale."""
    scale = bank.scale
    return bank.C * (scale[..., None, None] if isinstance(scale, Tensor) else scale)
