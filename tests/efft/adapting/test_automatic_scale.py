"""Test ``scale="auto"``, which chooses the scale so that every configuration moves the weights by a similar amount.

An adapter starts with one factor of zeros. The test replaces these zeros by ±1, which is the direction of the first
step of Adam, and measures the change of the merged weights. Other tests check that the chosen scales are saved.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import efft
from efft.adapting.inject import adapted_layers
from efft.methods.efft import AUTOMATIC
from efft.saving.io import read_description

Make = Callable[..., nn.Module]
CONFIGS: list[dict[str, Any]] = [
    {"rank": 8},
    {"rank": 32, "init": "uv"},
    {"rank": (24, 6), "core_init": "first"},
    {"rank": 16, "variant": "efft1", "init": "u", "core_init": "matrix"},
    {"rank": 16, "core_sharing": "shared"},
    {"rank": 8, "targets": "mhsa"},
    {"rank": 8, "movement": 2.0},
]


@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_a_step_of_the_zero_side_moves_the_weights_by_as_much(tiny_vit: Make, fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = efft.apply(tiny_vit(embed_dim=192, depth=3, num_heads=3), efft.EfftConfig.auto(dropout=0.0, **fields))
    before = {name: layer.weight.detach().double() for name, layer in adapted_layers(model).items()}
    with torch.no_grad():
        for factors in model.efft.banks():
            side = factors.U if factors.init == "u" else factors.V
            assert not side.any()
            side.copy_(torch.randint(0, 2, side.shape) * 2.0 - 1)
    efft.merge(model)
    moved: dict[str, list[torch.Tensor]] = {}
    for name, layer in adapted_layers(model).items():
        group = "joint" if "joint" in model.efft else "mhsa" if "attn" in name else "ffn"
        moved.setdefault(group, []).append((layer.weight.double() - before[name]).flatten())
    assert moved.keys() == set(model.efft)
    for updates in moved.values():
        assert torch.cat(updates).square().mean().sqrt() == pytest.approx(
            fields.get("movement", AUTOMATIC["movement"]), rel=0.15
        )


def test_numbers_are_written_down(tiny_vit: Make, tmp_path: Path) -> None:
    model = efft.apply(tiny_vit(), efft.EfftConfig.auto(rank=4))
    config = model.efft.config
    assert config.scale == {name: factors.scale_value for name, factors in model.efft.items()}
    efft.save_adapter(model, tmp_path)
    assert read_description(tmp_path)["config"]["scale"] == config.scale
    again = efft.load_adapter(tiny_vit(), tmp_path)
    assert again.efft.config.scale == config.scale


def test_by_group(tiny_vit: Make) -> None:
    config = efft.EfftConfig(rank=4, scale={"mhsa": "auto", "ffn": 2.0})
    model = efft.apply(tiny_vit(), config)
    assert config.scale == {"mhsa": "auto", "ffn": 2.0}, "apply changed the configuration of the caller"
    assert model.efft["ffn"].scale_value == 2.0
    automatic = efft.apply(tiny_vit(), efft.EfftConfig(rank=4, scale="auto"))
    assert model.efft["mhsa"].scale_value == automatic.efft["mhsa"].scale_value


def test_peft_writes_them_down_too(tiny_vit: Make) -> None:
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'efft-kernels[hf]'")
    from efft.integrations.peft import EfftPeftConfig

    model = peft.get_peft_model(tiny_vit(), EfftPeftConfig(rank=4, scale="auto"))
    ours = efft.apply(tiny_vit(), efft.EfftConfig(rank=4, scale="auto")).efft
    assert model.peft_config["default"].scale == ours.config.scale
