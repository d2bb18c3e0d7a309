"""Study EFFT2 on a convolutional network: a ResNet-18 trained on clothes learns silhouettes of animals.

    python -m benchmarks convolutions

No package contains the weights of a convolutional network. The study therefore first trains all weights of a network on
10,000 images of Fashion-MNIST. The network has group norm instead of batch norm, because an adapter would not store the
statistics of batch norm. Each method then learns another task from 1,000 images, which differ between seeds. A kernel
[out, in, 3, 3] counts as a matrix [out, 9 in]. The methods are:

- EFFT2: rank 8 and automatic scale, and LoRA (peft): rank 8, both on the 3x3 convolutions of all blocks, with the
  learning rate that is better on the validation split of the first seed;
- full fine-tuning, a tenth of these learning rates, chosen in the same way;
- linear probe: only the classifier, with a learning rate chosen for each seed.

Training takes six epochs instead of three as in the other studies, because this network has seen fewer images than a
pretrained transformer from a package.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

import efft
import efft_lab.data
from efft_lab.data.task import ImageDataset, Split
from efft_lab.studies.side_by_side import LORA, RECIPE, record, rows
from efft_lab.train import TrainConfig, run

SOURCE, TASK = "fashion-mnist", "animal-silhouettes"
SIZE, EPOCHS = 48, 6
LAYERS = r"layer\d\.\d\.conv[12]"


class Whole:
    """A task that trains on all images of its pool, not on the 1,000 that a seed draws."""

    def __init__(self, task: efft_lab.data.TaskData) -> None:
        pool = task.train.images
        self.train = self.trainval = ImageDataset(Split(pool, np.arange(len(pool.labels))), task.train.preprocess)
        self.val = self.test = task.test
        self.classes = task.classes


def resnet(classes: int) -> nn.Module:
    """Return an untrained ResNet-18 with group norm."""
    return timm.create_model("resnet18", num_classes=classes, norm_layer="groupnorm")


def pretrained(source: Any, epochs: int) -> tuple[nn.Module, float]:
    """Return a network after training all its weights on ``source``, and its test accuracy on ``source``."""
    torch.manual_seed(0)
    config = TrainConfig(**{**RECIPE, "method": "full", "epochs": epochs, "batch_size": 64, "lr": 1e-3, "amp": "no"})
    with tempfile.TemporaryDirectory() as out:
        result = run(config, out, model=resnet(source.classes), task=source, progress=False)
    assert result.model is not None
    return result.model, result.summary["test_accuracy"]


def study(source: Any, tasks: dict[int, Any], epochs: int) -> Iterator[dict[str, Any]]:
    """Yield one row per seed and method; see the module's description.

    Args:
        source: the task to train on first.
        tasks: for each seed, the task that follows, with that seed's training images.
        epochs: number of epochs of the first training.
    """
    network, accuracy = pretrained(source, epochs)
    state = {name: value for name, value in network.state_dict().items() if not name.startswith("fc.")}

    def create(classes: int) -> nn.Module:
        model = resnet(classes)
        model.load_state_dict(state, strict=False)
        return model

    recipes: dict[str, dict[str, Any]] = {
        "EFFT2": {"method": "efft", "efft": efft.EfftConfig(rank=8, scale="auto", dropout=0.0, targets=[LAYERS])},
        "LoRA (peft)": {"method": LORA},
        "full fine-tuning": {"method": "full", "rates": (1e-4, 3e-4)},
        "linear probe": {"method": "linear", "epochs": 40},
    }
    recipes = {title: {"epochs": EPOCHS, **recipe} for title, recipe in recipes.items()}
    for row in rows(TASK, tasks, create, recipes, LAYERS):
        yield {**row, "source": SOURCE, "source_accuracy": accuracy}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and append to ``convolutions.jsonl``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks convolutions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="folder for convolutions.jsonl")
    args = parser.parse_args(arguments)
    tasks = {seed: efft_lab.data.load(TASK, image_size=SIZE, seed=seed, max_test=1000) for seed in args.seeds}
    source = Whole(efft_lab.data.load(SOURCE, image_size=SIZE))
    record("convolutions", study(source, tasks, epochs=3), args.results)
    return 0
