"""Test a complete run: the files that it writes, the data that it reads, that it learns, and its errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset

import efft
from efft import EfftConfig
from efft_lab.train import TrainConfig, read_metrics, run
from efft_lab.train.build import load_trained


class Guarded(Dataset[Any]):
    """Count the reads of each item of a data set, and raise an error for a read while the data set is locked."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data, self.locked, self.reads = data, False, [0] * len(data)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        assert not self.locked, "read too early"
        self.reads[index] += 1
        return self.data[index]


@pytest.mark.parametrize(
    ("method", "saved"),
    [("efft", "adapter"), ("fact_tk", "adapter"), ("linear", "head.safetensors"), ("full", "model.safetensors")],
)
def test_run_learns_and_writes_its_folder(
    method: Any, saved: str, config: TrainConfig, task: Any, make_model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = replace(config, method=method, epochs=12, lr=1e-3 if method == "full" else 2e-2)
    result = run(config, tmp_path, model=model, task=task).summary

    assert result["test_accuracy"] > 0.4  # random predictions score 0.25
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert TrainConfig.load(tmp_path / "config.json") == config
    assert result["saved"] == saved
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "metrics.jsonl", "result.json", saved}
    changed = {
        name for name, tensor in model.state_dict().items() if name in before and not torch.equal(tensor, before[name])
    }
    if method == "full":
        assert changed >= {"head.weight", "blocks.0.attn.qkv.weight", "patch_embed.proj.weight"}
        assert result["trainable_parameters"] == sum(p.numel() for p in make_model().parameters())
    else:
        assert changed == {"head.weight", "head.bias"}
        assert result["trainable_parameters"] == result["factor_parameters"] + 32 * 4 + 4
    assert (result["factor_parameters"] > 0) == (saved == "adapter")


@pytest.mark.parametrize(
    ("method", "adapter", "lr"),
    [("adapter", {"width": 4}, 2e-2), ("bitfit", {}, 2e-2), ("vpt_deep", {"tokens": 3}, 2e-2), ("ssf", {}, 5e-3)],
)
def test_methods_to_compare_with_learn_and_are_rebuilt(
    method: str, adapter: dict[str, Any], lr: float, config: TrainConfig, task: Any, tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {"model": "test_vit", "pretrained": False, "image_size": 32, "efft": EfftConfig()}
    config = replace(config, method=method, adapter=adapter, epochs=8, lr=lr, **sizes)
    task = replace(task, **{name: _enlarged(getattr(task, name)) for name in ("train", "val", "trainval", "test")})
    result = run(config, tmp_path, task=task)
    assert result.summary["test_accuracy"] > 0.4  # random predictions score 0.25
    assert result.summary["saved"] == "trained.safetensors"
    assert result.summary["head_parameters"] == 64 * 4 + 4
    again, found = load_trained(tmp_path)
    assert found == config
    images = torch.randn(5, 3, 32, 32)
    assert result.model is not None
    with torch.no_grad():
        torch.testing.assert_close(again(images), result.model(images), rtol=0, atol=0)


def _enlarged(data: Dataset[Any]) -> Dataset[Any]:
    """Return the images with a border of two pixels, because test_vit requires 32 x 32 pixels."""
    images, labels = torch.utils.data.default_collate([data[i] for i in range(len(data))])  # type: ignore[arg-type]
    return torch.utils.data.TensorDataset(torch.nn.functional.pad(images, (2, 2, 2, 2)), labels)


@pytest.mark.parametrize("change", [{}, {"method": "vera", "adapter": {"rank": 4}}], ids=["efft", "vera"])
def test_saved_adapter_reproduces_the_live_model(
    change: dict[str, Any], config: TrainConfig, task: Any, make_model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model, images = make_model(), torch.randn(5, 3, 28, 28)
    run(replace(config, **change), tmp_path, model=model, task=task)
    fresh = efft.load_adapter(make_model(), tmp_path / "adapter").eval()
    efft.fuse(fresh)
    with torch.no_grad():
        torch.testing.assert_close(model(images), fresh(images), rtol=0, atol=0)


def test_select_keeps_the_best_epoch(
    config: TrainConfig, task: Any, make_model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model = make_model()
    result = run(replace(config, epochs=6, lr=3e-2), tmp_path, model=model, task=task).summary
    validation = [record["val_accuracy"] for record in read_metrics(tmp_path / "metrics.jsonl", "epoch")]
    assert result["val_accuracy"] == max(validation)
    assert result["best_epoch"] == validation.index(max(validation))
    # This check does not use the trainer: the final model has the score in the record of its epoch.
    images, labels = torch.utils.data.default_collate([task.val[i] for i in range(len(task.val))])
    with torch.no_grad():
        assert (model(images).argmax(-1) == labels).float().mean().item() == pytest.approx(result["val_accuracy"])


@pytest.mark.parametrize("protocol", ["select", "final"])
def test_test_split_is_read_once_and_last(
    protocol: Any, config: TrainConfig, task: Any, make_model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    task.test, others = Guarded(task.test), [Guarded(task.train), Guarded(task.val), Guarded(task.trainval)]
    task.train, task.val, task.trainval = others
    task.test.locked = True
    with pytest.raises(AssertionError, match="read too early"):
        run(replace(config, protocol=protocol), tmp_path, model=make_model(), task=task)
    assert len(read_metrics(tmp_path / "metrics.jsonl", "epoch")) == config.epochs  # training has ended
    task.test.locked = False
    for data in others:
        data.locked = True  # from now on only the test split may be read
    run(replace(config, protocol=protocol), tmp_path, model=make_model(), task=task, resume=True)
    assert set(task.test.reads) == {1}
    read = {name: sum(data.reads) for name, data in zip(("train", "val", "trainval"), others, strict=True)}
    if protocol == "select":
        assert read == {"train": 4 * 64, "val": 4 * 32, "trainval": 0}
    else:
        assert read == {"train": 0, "val": 0, "trainval": 4 * 96}


def test_metrics_records(config: TrainConfig, task: Any, make_model: Callable[[], nn.Module], tmp_path: Path) -> None:
    run(replace(config, log_every=3), tmp_path, model=make_model(), task=task)
    steps, epochs = (read_metrics(tmp_path / "metrics.jsonl", kind) for kind in ("step", "epoch"))
    assert [record["update"] for record in steps] == [1, 4, 7, 10, 13, 16]
    assert [record["update"] for record in epochs] == [4, 8, 12, 16]
    assert set(steps[0]) == {"kind", "epoch", "update", "loss", "lr", "seconds"}
    assert set(epochs[0]) == {
        "kind", "epoch", "update", "loss", "train_accuracy", "val_accuracy", "lr", "images_per_second", "seconds",
    }  # fmt: skip
    assert epochs[-1]["loss"] < epochs[0]["loss"]


def test_final_weights_are_those_of_the_last_epoch(
    config: TrainConfig, task: Any, make_model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    result = run(replace(config, protocol="final"), tmp_path, model=make_model(), task=task).summary
    assert result["val_accuracy"] is None
    assert result["best_epoch"] is None
    assert result["updates"] == 4 * (96 // 16)


def test_linear_head_file_holds_the_head_alone(
    config: TrainConfig, task: Any, make_model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model = make_model()
    run(replace(config, method="linear"), tmp_path, model=model, task=task)
    head = load_file(tmp_path / "head.safetensors")
    assert set(head) == {"head.weight", "head.bias"}
    assert torch.equal(head["head.weight"], model.get_parameter("head.weight"))


def test_bf16_run(config: TrainConfig, task: Any, make_model: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = make_model()
    result = run(replace(config, amp="bf16"), tmp_path, model=model, task=task).summary
    assert result["test_accuracy"] > 0.25
    with torch.no_grad():  # the final model no longer uses Accelerate's autocast
        assert model(torch.randn(1, 3, 28, 28)).dtype == torch.float32
        assert "autocast" not in repr(model.forward).lower()


def test_fp16_is_refused_on_the_cpu(config: TrainConfig, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("tests the error on a machine without a GPU")
    with pytest.raises(ValueError, match="amp='fp16' needs a GPU, and this run is on the CPU; use amp='bf16' or 'no'"):
        run(replace(config, amp="fp16"), tmp_path)


def test_too_few_images_for_a_batch(
    config: TrainConfig, task: Any, make_model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match="the training split has 64 images, fewer than one batch of 65; lower batch_size"
    ):
        run(replace(config, batch_size=65), tmp_path, model=make_model(), task=task)


def test_divergence_is_reported(
    config: TrainConfig, task: Any, make_model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    task.train = [(torch.full((3, 28, 28), float("nan")), 0)] * 64
    with pytest.raises(FloatingPointError, match=r"the loss is nan at update 1; lower lr or efft\.scale"):
        run(config, tmp_path, model=make_model(), task=task)
