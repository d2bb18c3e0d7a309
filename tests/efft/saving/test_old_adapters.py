"""Test that adapters in the first file format load and compute the recorded outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import efft
from tests.efft.saving.old_adapters.models import ADAPTERS, base, output

FOLDER = Path(__file__).parent / "old_adapters"
#: Tolerance in fp64 for the same computation by different kernels.
ROUNDING = {"rtol": 1e-9, "atol": 1e-11}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_old_adapter_computes_the_same(name: str, tmp_path: Path) -> None:
    build, x, _ = ADAPTERS[name]
    logits = torch.tensor(json.loads((FOLDER / name / "logits.json").read_text()), dtype=torch.float64)
    model = efft.load_adapter(base(build), FOLDER / name)
    efft.save_adapter(model, tmp_path)
    torch.testing.assert_close(output(model, x), logits, **ROUNDING)
    plain = base(build)
    assert not torch.allclose(output(plain, x), logits, rtol=1e-3)
    again = efft.load_adapter(base(build), tmp_path)
    torch.testing.assert_close(output(again, x), logits, **ROUNDING)
    assert (
        efft.adapted_layers(again).keys()
        == json.loads((FOLDER / name / "adapter_config.json").read_text())["base"]["layers"].keys()
    )
