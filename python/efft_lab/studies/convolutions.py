"""Study EFFT2 on a convolutional network: a ResNet-18 that was trained on clothes learns silhouettes of animals.

    python -m benchmarks convolutions

No Python package contains the weights of a convolutional network. The study therefore first trains all weights of a
network on 10,000 images of Fashion-MNIST. The network has group norm instead of batch norm. Training therefore changes
only the parameters of a method, and no running statistics. Each method then learns the task ``animal-silhouettes`` from
1,000 images, which differ between seeds. For EFFT2, a kernel [out, in, 3, 3] is a matrix [out, 9 in]. The methods are:

- EFFT2 with rank 8 and automatic scale, and LoRA of peft with rank 8. Both adapt the 3x3 convolutions of all blocks.
  Each uses the learning rate (1e-3 or 3e-3) that is better on the validation split of the first seed.
- Full fine-tuning, with a tenth of these learning rates, chosen in the same way.
- A linear probe, which trains only the classifier. Its learning rate is chosen for each seed.

The first two methods and full fine-tuning train for six epochs. Other studies use three epochs, but this network has
seen fewer images before than a pretrained transformer. The linear probe trains for 40 epochs.
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
    """A task that trains on all images of the training pool, not only on the 1,000 images that a seed selects.

    Its validation split is the test split of the original task.
    """

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
    """Run the study and yield one row (a line of the result file) per seed and method.

    Args:
        source: the first task, on which all weights are trained.
        tasks: maps each seed to the second task with the training images of that seed.
        epochs: number of epochs of the training on the first task.
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
