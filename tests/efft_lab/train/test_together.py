"""Test runs that are trained in one pass through their backbone: each ends like a run alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from efft import EfftConfig
from efft_lab.train import TrainConfig, read_metrics, run, run_together
from efft_lab.train.together import reason_against
from tests.efft_lab.train.conftest import CLASSES


@pytest.fixture
def make_model(tiny_vit: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    """Create models with equal weights and without drop path, whose random numbers models cannot share."""
    sizes = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "num_classes": CLASSES}

    def make() -> nn.Module:
        torch.manual_seed(0)
        return tiny_vit(**sizes)

    return make


@pytest.fixture
def configs(config: TrainConfig) -> list[TrainConfig]:
    """Return configurations with factor dropout, trained biases and norms, and three seeds and learning rates."""
    like = replace(config, drop_path=0.0, efft=EfftConfig(rank=4, dropout=0.2, bias="all", norms=True))
    return [replace(like, seed=seed, lr=lr) for seed, lr in ((0, 1e-2), (1, 3e-2), (2, 1e-2))]


@pytest.mark.parametrize("protocol", ["select", "final"])
def test_each_run_ends_like_a_run_alone(
    configs: list[TrainConfig], task: Any, make_model: Callable[[], nn.Module], tmp_path: Path, protocol: Any
) -> None:
    configs = [replace(config, protocol=protocol) for config in configs]
    folders = [tmp_path / f"together {config.seed}" for config in configs]
    models = [make_model() for _ in configs]
    results = run_together(configs, folders, models=models, tasks=[task] * 3, progress=False)
    for config, folder, result in zip(configs, folders, results, strict=True):
        alone = tmp_path / f"alone {config.seed}"
        expected = run(config, alone, model=make_model(), task=task, progress=False).summary
        same = ("trainable_parameters", "updates", "best_epoch", "config", "saved")
        assert {name: result.summary[name] for name in same} == {name: expected[name] for name in same}
        for kind, names in (("epoch", ("loss", "lr", "val_accuracy")), ("step", ("loss", "lr"))):
            got, wanted = (read_metrics(out / "metrics.jsonl", kind) for out in (folder, alone))
            assert len(got) == len(wanted)
            for name in names:
                values = [[line[name] for line in lines if line[name] is not None] for lines in (got, wanted)]
                torch.testing.assert_close(*map(torch.tensor, values), rtol=1e-4, atol=1e-4)
        weights = [load_file(out / "adapter" / "adapter_model.safetensors") for out in (folder, alone)]
        assert weights[0].keys() == weights[1].keys()
        for name, value in weights[0].items():
            got, wanted = [
                # The gradient of the bias of the keys is zero except for rounding errors, which AdamW amplifies.
                torch.cat([t.chunk(3)[0], t.chunk(3)[2]]) if name.endswith("qkv.bias") else t
                for t in (value, weights[1][name])
            ]
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4, msg=name)
        assert not result.model.training


def test_autocast(configs: list[TrainConfig], task: Any, make_model: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Under autocast, the first loss is that of a run alone. Later losses differ slightly, because rounding differs."""
    configs = [replace(config, amp="bf16", epochs=1) for config in configs]
    folders = [tmp_path / f"together {config.seed}" for config in configs]
    run_together(configs, folders, models=[make_model() for _ in configs], tasks=[task] * 3, progress=False)
    for config, folder in zip(configs, folders, strict=True):
        run(config, tmp_path / f"alone {config.seed}", model=make_model(), task=task, progress=False)
        losses = [
            torch.tensor([line["loss"] for line in read_metrics(out / "metrics.jsonl", "step")])
            for out in (folder, tmp_path / f"alone {config.seed}")
        ]
        torch.testing.assert_close(*losses, rtol=0.02, atol=0.0)
        assert losses[0][0] == losses[1][0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"method": "full"}, "method 'full' does not keep a frozen backbone"),
        ({"method": "bitfit"}, "method 'bitfit' does not keep a frozen backbone"),
        ({"method": "loretta_adp"}, "method 'loretta_adp' does not keep a frozen backbone"),
        ({"drop_path": 0.1}, r"drop_path must be 0, .* got 0\.1"),
        ({"amp": "fp16"}, "with amp='fp16', each run scales its loss by itself"),
        ({"prune_at": 1}, "prune_at reduces the ranks"),
        ({"pretrained": False}, "with random weights, every seed has another backbone"),
    ],
    ids=lambda value: str(value),
)
def test_what_cannot_be_trained_together(
    configs: list[TrainConfig], tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    configs = [replace(config, **changes) for config in configs]
    with pytest.raises(ValueError, match=f"these runs cannot be trained together: {reason}"):
        run_together(configs, [tmp_path / str(i) for i in range(3)])
    assert not list(tmp_path.iterdir())


def test_runs_that_differ_in_more_than_seeds_and_rates(configs: list[TrainConfig]) -> None:
    assert reason_against(configs) is None
    configs[1] = replace(configs[1], epochs=5, batch_size=8)
    assert "but these differ in epochs, batch_size" in str(reason_against(configs))


def test_a_loss_that_is_not_finite_ends_all_runs(
    configs: list[TrainConfig], task: Any, make_model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    configs[1] = replace(configs[1], lr=1e30)
    with pytest.raises(FloatingPointError, match="the loss is"):
        run_together(
            configs,
            [tmp_path / str(i) for i in range(3)],
            models=[make_model() for _ in configs],
            tasks=[task] * 3,
            progress=False,
        )


def test_no_checkpoint_remains_that_a_run_alone_could_continue(
    configs: list[TrainConfig], task: Any, make_model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    """Its random numbers would not be those of the run, so the results would differ in silence."""
    configs[1] = replace(configs[1], lr=1e30)
    folders = [tmp_path / str(i) for i in range(3)]
    with pytest.raises(FloatingPointError):
        run_together(configs, folders, models=[make_model() for _ in configs], tasks=[task] * 3, progress=False)
    assert all((folder / "config.json").exists() for folder in folders)
    assert not [path for folder in folders for path in folder.rglob("checkpoint*")]


def test_arguments_that_do_not_fit(
    configs: list[TrainConfig], task: Any, make_model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    folders = [tmp_path / str(i) for i in range(3)]
    for wrong in (folders[:2], [folders[0]] * 3, [str(folders[0])] * 3):
        with pytest.raises(ValueError, match="expected folders for 3 runs"):
            run_together(configs, wrong)
    with pytest.raises(ValueError, match=r"expected tasks for 3 runs .*, got 2 different"):
        run_together(configs, folders, tasks=[task, task])
    with pytest.raises(ValueError, match="expected folders for 0 runs"):
        run_together([], [])
    assert not list(tmp_path.iterdir())
    fewer = replace(task, train=task.val)
    with pytest.raises(ValueError, match=r"cannot be trained together: they have \[4, 2\] batches per epoch"):
        run_together(configs[:2], folders[:2], models=[make_model(), make_model()], tasks=[task, fewer], progress=False)
