"""Provide a tiny random ViT and easy generated images, for runs that take a second and still learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from efft import EfftConfig
from efft_lab.train import TrainConfig

pytest.importorskip("accelerate", reason="training needs the train extra")

CLASSES = 4


@dataclass
class TinyTask:
    """Provide the part of efft_lab.data.TaskData that the trainer uses."""

    train: Dataset[Any]
    val: Dataset[Any]
    trainval: Dataset[Any]
    test: Dataset[Any]
    classes: int = CLASSES


@pytest.fixture
def task() -> TinyTask:
    """Return noise images whose red channel is brighter for higher classes.

    The task has 64 training, 32 validation and 40 test images of 28 pixels.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(136) % CLASSES
    images = 0.5 * torch.randn(136, 3, 28, 28, generator=generator)
    images[:, 0] += labels[:, None, None]
    data = TensorDataset(images, labels)
    return TinyTask(
        Subset(data, range(64)), Subset(data, range(64, 96)), Subset(data, range(96)), Subset(data, range(96, 136))
    )


@pytest.fixture
def make_model(tiny_vit: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    sizes = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "num_classes": CLASSES}
    return lambda: tiny_vit(**sizes, drop_path_rate=0.1)


@pytest.fixture
def config() -> TrainConfig:
    """Return the configuration of a run of four epochs with four updates each, which uses all sources of randomness."""
    return TrainConfig(
        efft=EfftConfig(rank=4, scale=10.0, dropout=0.1),
        epochs=4,
        batch_size=16,
        lr=1e-2,
        schedule_per="update",
        log_every=1,
        checkpoint_every=1,
    )
