"""Test TrainConfig: JSON round trip, checks and their error texts, and the schedule that it describes."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from efft import EfftConfig
from efft.methods import LoRAConfig
from efft_lab.train import TrainConfig, read_metrics, run, trainer
from efft_lab.train import config as module
from efft_lab.train.build import EpochBatches


def test_defaults_are_the_recipe() -> None:
    config = TrainConfig()
    assert (config.lr, config.weight_decay, config.batch_size, config.epochs) == (1e-3, 1e-4, 64, 100)
    assert (config.drop_path, config.seed, config.schedule_per, config.normalization) == (0.1, 42, "epoch", "imagenet")
    assert (config.warmup, config.warmup_lr, config.min_lr) == (0.1, 1e-6, 1e-5)


def test_json_round_trip(tmp_path: Path) -> None:
    adapter = EfftConfig(rank={"mhsa": 8, "ffn": (4, 8)}, scale=10.0, targets=["attn.qkv"])
    config = TrainConfig(data="digits", method="linear", checkpoint_every=3, lr=0.5, efft=adapter)
    config.save(tmp_path / "config.json")
    assert TrainConfig.load(tmp_path / "config.json") == config


def test_json_round_trip_of_another_method(tmp_path: Path) -> None:
    config = TrainConfig(method="lora", adapter={"rank": 2, "targets": ["attn.qkv"]})
    config.save(tmp_path / "config.json")
    assert TrainConfig.load(tmp_path / "config.json") == config
    assert config.adapter_config() == LoRAConfig(rank=2, targets=["attn.qkv"])


def test_fields_left_out_keep_their_defaults(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"lr": 0.25, "efft": {"rank": 4}}')
    assert TrainConfig.load(tmp_path / "config.json") == TrainConfig(lr=0.25, efft=EfftConfig(rank=4))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"epoch": 3}', "unknown field 'epoch' in the training configuration; did you mean 'epochs'?"),
        ('{"efft": {"rnk": 3}}', "unknown field 'rnk' in the training configuration; did you mean 'rank'?"),
        ('{"zzz": 3}', "unknown field 'zzz' in the training configuration; known: data, "),
        ('{"method": "prefix"}', "method must be one of efft, lora, .*, linear, full, .*vpt_deep, got 'prefix'"),
        ('{"method": "lora", "adapter": {"rnk": 3}}', "unknown field 'rnk' in the .*; did you mean 'rank'?"),
        ('{"method": "lora", "adapter": {"rank": 0}}', "LoRAConfig.rank must be an integer from 1 to 65536, got 0"),
        ('{"adapter": {"rank": 8}}', r"adapter is not read by method 'efft' \(its settings are those of efft\)"),
        (
            '{"method": "full", "adapter": {"rank": 8}}',
            r"not read by method 'full' \(it has no settings\), got {'rank'",
        ),
        ('{"epochs": 0}', "epochs must be at least 1, got 0"),
        ('{"warmup": 1}', r"warmup must be in \[0, 1\), got 1"),
        ('{"lr": "1"}', "lr must be a number, got '1'"),
        ('{"lr": NaN}', "lr must be a number, got nan"),
        ('{"epochs": true}', "epochs must be an integer, got True"),
        ('{"epochs": 2.5}', "epochs must be an integer, got 2.5"),
        ('{"pretrained": 1}', "pretrained must be true or false, got 1"),
        ('{"checkpoint": 3}', "checkpoint must be a string or nothing, got 3"),
        ('{"amp": "fp8"}', "amp must be one of no, bf16, fp16, got 'fp8'"),
        ('{"efft": 3}', "efft must be an object, got 3"),
        ('{"adapter": []}', r"adapter must be an object or nothing, got \[\]"),
        (
            '{"method": "peft_lora", "adapter": {"rnk": 3}}',
            "method 'peft_lora' has no setting 'rnk'; it has: rank, alpha",
        ),
        ('{"method": "adapter", "adapter": {"width": 0}}', "width of method 'adapter' must be at least 1, got 0"),
        ('{"method": "adapter", "adapter": {"width": "8"}}', "width of method 'adapter' must be an integer, got '8'"),
        ("[1]", "must hold a JSON object, got list"),
        ("{", "is not JSON: "),
    ],
)
def test_bad_files(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        TrainConfig.load(tmp_path / "config.json")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no configuration file .*nope\.json"):
        TrainConfig.load(tmp_path / "nope.json")


def test_every_field_is_explained() -> None:
    tree = ast.parse(inspect.getsource(module))
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef))
    explained = {
        field.target.id
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }
    assert explained == {field.name for field in dataclasses.fields(TrainConfig)}


def learning_rates(config: TrainConfig, model: nn.Module, task: Any, folder: Path) -> list[float]:
    run(replace(config, method="linear", log_every=1), folder, model=model, task=task)
    return [record["lr"] for record in read_metrics(folder / "metrics.jsonl", "step")]


def test_paper_schedule(
    task: Any, make_model: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The expected learning rates were computed by hand from the scheduler of the paper's code (timm 0.5.4)."""
    monkeypatch.setattr(trainer, "save_checkpoint", lambda path, state: None)  # a hundred checkpoints take too long
    paper = TrainConfig()  # 64 images: one update per epoch
    rates = learning_rates(paper, make_model(), task, tmp_path)
    assert len(rates) == 100
    assert rates[0] == rates[1] == pytest.approx(1e-6)
    assert rates[2] == pytest.approx(1.01e-4, rel=0.01)
    assert rates[10] == pytest.approx(9.0e-4, rel=1e-3)
    assert rates[11] == max(rates) == pytest.approx(9.76e-4, rel=1e-3)
    assert rates[99] == pytest.approx(1.1e-5, rel=0.01)


def test_schedule_per_update(
    config: TrainConfig, task: Any, make_model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    rates = learning_rates(replace(config, epochs=5, warmup=0.25, lr=1.0), make_model(), task, tmp_path)
    assert len(rates) == 20
    assert rates[0] == pytest.approx(1e-6)
    assert rates[1] == pytest.approx(0.2, rel=1e-3)  # warm-up takes a quarter of 20 updates
    assert rates[10] == pytest.approx(0.5, rel=1e-3)  # cosine at half of the schedule
    assert rates[6:] == sorted(rates[6:], reverse=True)


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int, skip: int = 0) -> list[list[int]]:
        batches = EpochBatches(10, 3, seed)
        batches.start(epoch, skip)
        return list(batches)

    assert order(1, 5) == order(1, 5)
    assert order(1, 5, skip=2) == order(1, 5)[2:]
    assert order(1, 5) != order(1, 6)
    assert order(1, 5) != order(2, 5)
    images = [index for batch in order(1, 5) for index in batch]
    assert len(images) == len(set(images)) == 9  # the incomplete batch is dropped
    assert set(images) < set(range(10))


def test_configuration_is_plain_json() -> None:
    assert json.loads(json.dumps(TrainConfig().to_dict()))["efft"]["rank"] == 32
