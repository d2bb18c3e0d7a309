"""Train a linear probe: a linear classifier on the features of a frozen model.

The features are the inputs of the model's classifier, and they are computed only once. The learning rate is selected on
the validation split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from efft_lab.train.config import TrainConfig
from efft_lab.train.inference import collect, device
from efft_lab.train.trainer import RunResult, run

if TYPE_CHECKING:
    from efft_lab.data import TaskData


class FeatureTask:
    """A task whose inputs are features instead of images.

    The features of a split are computed when the split is first used.

    Args:
        model: a timm model. It is set to evaluation mode.
        task: the task with the images.
        amp: number format for autocast ("no", "bf16" or "fp16") when the features are computed.
    """

    def __init__(self, model: nn.Module, task: TaskData, amp: str) -> None:
        self._model, self._task, self._amp = model.eval().to(device()), task, amp
        self.classes = task.classes

    def _features(self, images: Tensor) -> Tensor:  # [batch, 3, size, size] -> [batch, width]
        hidden: Any = self._model.forward_features(images)  # type: ignore[operator]  # a timm method
        return self._model.forward_head(hidden, pre_logits=True)  # type: ignore[operator]

    def _of(self, role: str) -> TensorDataset:
        title = f"features of {role}"
        return TensorDataset(*collect(self._features, getattr(self._task, role), amp=self._amp, title=title))

    @cached_property
    def train(self) -> TensorDataset:
        return self._of("train")

    @cached_property
    def val(self) -> TensorDataset:
        return self._of("val")

    @cached_property
    def trainval(self) -> TensorDataset:
        return self._of("trainval")

    @cached_property
    def test(self) -> TensorDataset:
        return self._of("test")


class WithoutTest:
    """A task for selecting hyperparameters. The test split of the original task cannot be reached through it.

    The validation split replaces the test split and the split ``trainval``.

    Args:
        task: a ``TaskData``, or an object with the same splits and number of classes.
    """

    def __init__(self, task: Any) -> None:
        self.train: Dataset[Any] = task.train
        self.val = self.trainval = self.test = task.val
        self.classes = task.classes


class Head(nn.Module):
    """A linear classifier for features [batch, width]."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, classes)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(features)

    def get_classifier(self) -> nn.Linear:
        """Return the classifier. timm's models use the same method name."""
        return self.head


def linear_probe(
    config: TrainConfig,
    out: str | Path,
    model: nn.Module,
    task: TaskData,
    learning_rates: Sequence[float] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
) -> RunResult:
    """Train a linear classifier on features with the same trainer as every other method.

    For each learning rate, one run trains on the train split and is evaluated on the validation split. A final run then
    trains with the best learning rate and is tested once. The features are computed in evaluation mode. Stochastic
    depth is therefore not used.

    Args:
        config: configuration of the final run. ``method``, ``lr`` and ``drop_path`` are ignored, and ``amp`` applies
            only to computing the features.
        out: folder of the final run. The runs that select the learning rate are written to its subfolder ``search``.
        model: the pretrained timm model, with or without a classifier.
        task: the data.
        learning_rates: the learning rates to try.
    """
    features = FeatureTask(model, task, config.amp)
    width = features.train.tensors[0].shape[1]
    config = replace(config, method="linear", drop_path=0.0, amp="no")
    scores = {}
    for lr in learning_rates:
        folder = Path(out) / "search" / f"lr-{lr:g}"
        choice: Any = WithoutTest(features)
        trial = replace(config, lr=lr, protocol="select")
        result = run(trial, folder, model=Head(width, task.classes), task=choice, overwrite=True)
        scores[lr] = result.summary["val_accuracy"]
    best = max(scores, key=lambda lr: scores[lr])
    final: Any = features
    return run(replace(config, lr=best), out, model=Head(width, task.classes), task=final, overwrite=True)
