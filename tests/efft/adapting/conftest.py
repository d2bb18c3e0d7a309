"""Provide a fixture for tests of models with trained biases and norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import efft
from efft.adapting.inject import adapter_of

Make = Callable[..., nn.Module]
#: Settings that train all biases and norms.
ALL: dict[str, Any] = {"rank": 4, "bias": "all", "norms": True, "dropout": 0.0}


@pytest.fixture
def trained(tiny_vit: Make, randomize: Make) -> Make:
    """Return an adapted tiny ViT in eval mode whose trained biases and norms differ from those of the base."""

    def make(**changes: Any) -> nn.Module:
        model = randomize(efft.apply(tiny_vit().eval(), efft.EfftConfig(**{**ALL, **changes})), 0.3)
        generator = torch.Generator().manual_seed(3)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name in adapter_of(model).extras:
                parameters[name].add_(torch.randn(parameters[name].shape, generator=generator), alpha=0.2)
        return model

    return make
