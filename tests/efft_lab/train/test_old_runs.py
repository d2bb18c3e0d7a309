"""Test that runs from before the experiment code was a separate package load, compute the same, and can resume.

The folders in ``old_runs`` were written by ``efft.train.run`` in a checkout of commit 2572b1e. They hold one complete
run for each kind of saved file, except the kinds with large files. The run ``efft-stopped`` was killed after 24 of 32
updates. ``logits.json`` holds the outputs of the models at that commit.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from efft.methods import EfftConfig
from efft.saving import base
from efft_lab.train import TrainConfig, run
from efft_lab.train.build import load_trained

pytest.importorskip("timm", reason="needs the vision extra")
pytest.importorskip("sklearn", reason="needs scikit-learn, which contains the digits")

FOLDER = Path(__file__).parent / "old_runs"
LOGITS = json.loads((FOLDER / "logits.json").read_text())


def logits(model: nn.Module) -> Tensor:
    """Return the logits of two fixed images, which are computed without a random generator."""
    images = torch.arange(2 * 3 * 32 * 32, dtype=torch.float32).mul(1.7).sin().view(2, 3, 32, 32)
    with torch.no_grad():
        result: Tensor = model(images)
    return result


@pytest.mark.parametrize("name", [*LOGITS, "efft/adapter"])
def test_an_old_run_computes_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = FOLDER / name.split("/")[0] / "adapter" / "adapter_config.json"
    if saved.exists():
        # The last bits of the random base weights depend on the processor, so their fingerprint may differ.
        fingerprint = json.loads(saved.read_text())["base"]["fingerprint"]
        monkeypatch.setattr(base, "_fingerprint", lambda model, layers: fingerprint)
    model, config = load_trained(FOLDER / name)
    torch.testing.assert_close(logits(model), torch.tensor(LOGITS[name.split("/")[0]]), rtol=1e-4, atol=1e-4)
    assert config.model == "test_vit"


def test_an_old_checkpoint_resumes_to_the_unbroken_run(tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "efft-stopped", tmp_path / "run")
    config = TrainConfig.load(tmp_path / "run" / "config.json")
    result = run(config, tmp_path / "run", resume=True, progress=False)
    assert result.model is not None
    torch.testing.assert_close(logits(result.model), torch.tensor(LOGITS["efft"]), rtol=1e-3, atol=1e-3)
    before = json.loads((FOLDER / "efft" / "result.json").read_text())
    # The result also records settings that did not exist yet at that commit, with values that mean the same.
    before["config"]["efft"] = {**EfftConfig.meant_before, **before["config"]["efft"]}
    for name in ("updates", "best_epoch", "trainable_parameters", "classes", "saved", "config"):
        assert result.summary[name] == before[name], name
