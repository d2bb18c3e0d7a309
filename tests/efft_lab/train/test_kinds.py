"""Test runs for segmentation and regression: data on disk, training, reloading, resuming, and the model card."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import efft
import efft_lab.data
from efft_lab.cli import main
from efft_lab.train import TrainConfig, build, folder, read_metrics, run
from efft_lab.train.build import load_trained
from efft_lab.train.trainer import Trainer

Image = pytest.importorskip("PIL.Image", reason="needs the dev extra")
for package in ("timm", "tyro"):
    pytest.importorskip(package, reason="needs the dev extra")

SMALL: dict[str, Any] = {
    **{"model": "test_vit", "pretrained": False, "image_size": 64, "epochs": 12, "batch_size": 8, "lr": 1e-2},
    **{"schedule_per": "update", "log_every": 1, "normalization": "half", "drop_path": 0.0},
    "efft": efft.EfftConfig(rank=4, scale=10.0),
}


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    """Create images with masks: 4 x 4 squares of class 0 (dark), 1 (red) or 2 (green), as large as a patch."""
    random = np.random.RandomState(0)
    colors = np.array([[20, 20, 20], [220, 30, 30], [30, 220, 30]])
    for number in range(60):
        numbers = np.kron(random.randint(0, 3, (4, 4)), np.ones((16, 16), int))
        pixels = np.clip(colors[numbers] + random.randint(-20, 20, (64, 64, 3)), 0, 255)
        for name, values in (("images", pixels), ("masks", numbers)):
            (tmp_path / "cells" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.astype(np.uint8)).save(tmp_path / "cells" / name / f"{number}.png")
    return tmp_path / "cells"


@pytest.fixture
def grey(tmp_path: Path) -> Path:
    """Create gray images and a table with their targets: 1000 plus ten times the gray value."""
    lines = ["file,dose"]
    for number in range(60):
        level = 10 + 4 * number
        pixels = np.full((64, 64, 3), level, np.uint8)
        pixels[0, 0] = number
        (tmp_path / "grey").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "grey" / f"{number}.png")
        lines.append(f"{number}.png,{1000 + 10 * level}")
    (tmp_path / "grey/doses.csv").write_text("\n".join(lines))
    return tmp_path / "grey/doses.csv"


def words(config: TrainConfig, path: Path) -> list[str]:
    """Write the configuration to a file and return the words of a command that reads it."""
    config.save(path)
    return ["train", "--config", str(path)]


def test_segmentation(cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = TrainConfig(data=str(cells), task="segmentation", **SMALL), tmp_path / "run"
    assert main([*words(config, tmp_path / "c.json"), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    assert f"test miou {result['test_miou']:.2%}, pixel_accuracy {result['test_pixel_accuracy']:.2%}, val" in said
    assert result["test_miou"] > 0.6  # random predictions score below 0.2
    assert (result["classes"], result["head_parameters"]) == (3, 3 * 64 + 3)
    assert result["factor_parameters"] > 0
    epochs = read_metrics(out / "metrics.jsonl", "epoch")
    assert epochs[result["best_epoch"]]["val_miou"] == result["val_miou"] == max(e["val_miou"] for e in epochs)
    assert {"train_miou", "train_pixel_accuracy", "val_pixel_accuracy"} <= epochs[0].keys()

    for path in (out, out / "adapter"):
        assert main(["eval", str(path), "--split", "test", "--per-class"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"test miou {result['test_miou']:.2%}, pixel_accuracy")
        shares = [float(line.split("%")[0]) / 100 for line in lines[1:]]
        assert np.mean(shares) == pytest.approx(result["test_miou"], abs=1e-4)

    # This check uses neither goals nor loops: it computes the share of pixels that the reloaded model gets right.
    model, found = load_trained(out)
    assert found == config
    task = efft_lab.data.load(cells, image_size=64, normalization="half", kind="segmentation")
    images, masks = (torch.stack(each) for each in zip(*task.test, strict=True))
    with torch.no_grad():
        right = (model(images).argmax(1) == masks).float().mean().item()
    assert right == pytest.approx(result["test_pixel_accuracy"], abs=1e-5)
    assert main(["merge", str(out)]) == 0
    assert main(["export", str(out)]) == 0


def test_regression(grey: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = TrainConfig(data=str(grey), task="regression", **SMALL), tmp_path / "run"
    assert main([*words(config, tmp_path / "c.json"), "--out", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["test_r2"] > 0.5
    assert f"test r2 {result['test_r2']:.4g}, mae {result['test_mae']:.4g}" in capsys.readouterr().out
    assert main(["eval", str(out / "adapter"), "--split", "test", "--per-class"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"test r2 {result['test_r2']:.4g}, mae {result['test_mae']:.4g}")
    assert lines[1].endswith("  dose")

    model, _ = load_trained(out)  # the model predicts doses rather than standardized values
    task = efft_lab.data.load(grey, image_size=64, normalization="half", kind="regression")
    images, doses = (torch.stack(each) for each in zip(*task.test, strict=True))
    with torch.no_grad():
        error = (model(images) - doses).abs().mean().item()
    assert error == pytest.approx(result["test_mae"], rel=1e-3)


@pytest.mark.parametrize("method", ["linear", "full", "lora"])
@pytest.mark.parametrize("kind", ["segmentation", "regression"])
def test_other_methods(kind: Any, method: str, cells: Path, grey: Path, tmp_path: Path) -> None:
    data = cells if kind == "segmentation" else grey
    config = replace(TrainConfig(data=str(data), task=kind, **SMALL), epochs=2, method=method, lr=1e-3)
    config = replace(config, protocol="final", regression_loss="l1")
    result = run(config, tmp_path / "run", progress=False)
    assert result.model is not None
    again, _ = load_trained(tmp_path / "run")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(images), result.model(images), rtol=0, atol=0)


def test_methods_that_cannot_segment() -> None:
    with pytest.raises(ValueError, match="method 'vpt_deep' supports only plain timm models and cannot train segm"):
        TrainConfig(task="segmentation", method="vpt_deep")


@pytest.mark.parametrize("kind", ["segmentation", "regression"])
def test_resumed_in_the_middle(
    kind: Any, cells: Path, grey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = cells if kind == "segmentation" else grey
    config = replace(TrainConfig(data=str(data), task=kind, **SMALL), epochs=2, checkpoint_every=2)
    unbroken = run(config, tmp_path / "one", progress=False)
    step: Callable[..., None] = Trainer.step

    def stopping(self: Trainer, *batch: Any) -> None:
        if self.update == 3:
            raise KeyboardInterrupt
        step(self, *batch)

    monkeypatch.setattr(Trainer, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "two", progress=False)
    monkeypatch.undo()
    resumed = run(config, tmp_path / "two", resume=True, progress=False)
    models: list[nn.Module] = [r.model for r in (unbroken, resumed) if r.model is not None]
    for (name, ours), theirs in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    for key in ("test_miou", "val_miou") if kind == "segmentation" else ("test_r2", "val_mae"):
        assert unbroken.summary[key] == resumed.summary[key]


def test_facts_for_the_model_card(grey: Path, tmp_path: Path) -> None:
    from efft.saving.io import read_description

    config = replace(TrainConfig(data=str(grey), task="regression", **SMALL), epochs=1)
    result = run(config, tmp_path / "run", progress=False).summary
    info = read_description(tmp_path / "run/adapter")["info"]
    assert info["datasets"] == ["doses"]
    assert info["metrics"] == {name: result[f"test_{name}"] for name in ("r2", "mae", "rmse")}
    assert "base_model" not in info  # its weights are random


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
def test_published_weights_are_named_with_their_license(kind: Any) -> None:
    """The test does not download the weights."""
    config = TrainConfig(model="vit_base_patch16_224.augreg_in21k", task=kind)
    with torch.device("meta"):
        model = build.create_model(config, 3, weights=False)
    facts = folder.card_facts(config, model, None, {"test_accuracy": 0.5, "val_accuracy": 0.4}, own_model=False)
    assert facts == {
        "base_model": "timm/vit_base_patch16_224.augreg_in21k",
        "license": "apache-2.0",
        "metrics": {"accuracy": 0.5},
    }
    for change in ({"checkpoint": "mine.pth"}, {"pretrained": False}):
        other = replace(config, **change)
        assert "base_model" not in folder.card_facts(other, model, None, {}, own_model=False)
    assert "base_model" not in folder.card_facts(config, model, None, {}, own_model=True)
