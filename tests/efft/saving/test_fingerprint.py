"""Test the check that an adapter is loaded onto the base of its training.

A fingerprint in the adapter's file identifies the base weights. If the base has another dtype, the fingerprint differs.
Then a sketch, which consists of two numbers per weight, is compared up to rounding errors.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import efft
from tests.adapter_files import edit_config

Make = Callable[..., nn.Module]
#: The dtypes of the base, both in training and when the adapter is loaded.
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def other_base(tiny_vit: Make) -> nn.Module:
    model = tiny_vit()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc1.weight.normal_(std=0.02, generator=generator)
    return model


@pytest.mark.parametrize("loaded", DTYPES)
@pytest.mark.parametrize("trained", DTYPES)
def test_another_dtype(trained: torch.dtype, loaded: torch.dtype, tiny_vit: Make, tmp_path: Path) -> None:
    efft.save_adapter(efft.apply(tiny_vit().to(trained), efft.EfftConfig(rank=4)), tmp_path)
    efft.load_adapter(tiny_vit().to(trained).to(loaded), tmp_path)
    reason = (
        "fingerprints differ" if trained == loaded else r"2 layers, 'blocks\.0\.mlp\.fc1' first, differ by more than"
    )
    with pytest.raises(ValueError, match=rf"the base weights are not those it was trained on \({reason}"):
        efft.load_adapter(other_base(tiny_vit).to(loaded), tmp_path)


def test_files_without_a_sketch_load_as_before(tiny_vit: Make, tmp_path: Path) -> None:
    efft.save_adapter(efft.apply(tiny_vit(), efft.EfftConfig(rank=4)), tmp_path)
    edit_config(tmp_path, lambda config: config["base"].pop("sketch"))
    efft.load_adapter(other_base(tiny_vit).bfloat16(), tmp_path)
    with pytest.raises(ValueError, match="fingerprints differ"):
        efft.load_adapter(other_base(tiny_vit), tmp_path)


@pytest.mark.parametrize("sketch", [3, [], {}, None, "1", "1 2 3", "1 x", "1 nan", "1 2,", "1 2,3 4"])
def test_damaged_sketches(sketch: object, tiny_vit: Make, tmp_path: Path) -> None:
    efft.save_adapter(efft.apply(tiny_vit(), efft.EfftConfig(rank=4)), tmp_path)
    edit_config(tmp_path, lambda config: config["base"].update(sketch=sketch))
    with pytest.raises(ValueError, match=r"'base\.sketch' must be pairs of numbers or '-', separated by commas"):
        efft.load_adapter(tiny_vit(), tmp_path)
