"""What a run learns, by kind of task: the loss, the prediction, and the scores by which it is judged.

Scores are computed from statistics that add up over batches and processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from efft.adapting.heads import find_head

if TYPE_CHECKING:
    from efft_lab.train.config import TrainConfig

IGNORED = 255  # label of pixels in a mask that do not count


class Goal(Protocol):
    """One kind of task. ``score`` is the name of the score that selects the best epoch; greater is better."""

    score: str

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch, from the outputs of the model; a scalar."""

    def predict(self, outputs: Tensor) -> Tensor:
        """Turns outputs of the model into predictions that are compared with labels, [batch, ...]."""

    def statistics(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """Sums over a batch from which :meth:`scores` are computed, [n]."""

    def scores(self, statistics: Tensor) -> dict[str, float]:
        """Scores by name, from the sum of the statistics of all batches."""

    def details(self, statistics: Tensor) -> list[float]:
        """One score for each class or value."""

    def finish(self, model: nn.Module) -> None:
        """Changes a trained model, in place, so that its outputs are the predicted quantities themselves."""


class Classification:
    """One class per image: outputs [batch, classes], labels [batch]."""

    score = "accuracy"

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, labels)

    def predict(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(-1)

    def statistics(self, predictions: Tensor, labels: Tensor) -> Tensor:
        correct = (predictions == labels).sum()
        return torch.stack([correct, torch.full_like(correct, len(labels))])

    def scores(self, statistics: Tensor) -> dict[str, float]:
        correct, images = statistics.tolist()
        return {"accuracy": correct / images}

    def details(self, statistics: Tensor) -> list[float]:
        return []

    def finish(self, model: nn.Module) -> None:
        pass


class Segmentation:
    """One class per pixel: outputs [batch, classes, height, width], labels [batch, height, width]. Pixels with label
    255 do not count."""

    score = "miou"

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        total = functional.cross_entropy(outputs, labels, ignore_index=IGNORED, reduction="sum")
        return total / (labels != IGNORED).sum().clamp(min=1)

    def predict(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(1)

    def statistics(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """The confusion matrix, flattened: how often each true class (row) was predicted as which class (column)."""
        cells = self.classes**2
        pairs = torch.where(labels == IGNORED, cells, labels * self.classes + predictions)
        return torch.bincount(pairs.flatten(), minlength=cells + 1)[:cells]

    def scores(self, statistics: Tensor) -> dict[str, float]:
        """Mean intersection over union of the classes that occur or were predicted, and the share of correct pixels."""
        table = statistics.view(self.classes, self.classes).double()
        shares = self._shares(table)
        accuracy = (table.trace() / table.sum()).item() if table.sum() else 0.0
        known = shares[~shares.isnan()]
        return {"miou": known.mean().item() if len(known) else 0.0, "pixel_accuracy": accuracy}

    def details(self, statistics: Tensor) -> list[float]:
        """Intersection over union of each class; NaN where it does not occur."""
        return [float(share) for share in self._shares(statistics.view(self.classes, self.classes).double())]

    def _shares(self, table: Tensor) -> Tensor:
        right = table.diagonal()
        return right / (table.sum(0) + table.sum(1) - right)

    def finish(self, model: nn.Module) -> None:
        pass


class Regression:
    """Numbers per image: outputs [batch, values], labels [batch, values].

    The model learns values minus ``mean``, divided by ``std``, so that the same learning rates suit values of any size;
    :meth:`finish` folds both into the last layer.

    Args:
        mean, std: of each value over the training images, [values].
        norm: the loss, "mse" or "l1".
    """

    score = "r2"

    def __init__(self, mean: Tensor, std: Tensor, norm: str) -> None:
        self.mean, self.std = mean.float(), std.float()
        self.norm = {"mse": functional.mse_loss, "l1": functional.l1_loss}[norm]

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return self.norm(outputs, (labels - self.mean.to(labels.device)) / self.std.to(labels.device))

    def predict(self, outputs: Tensor) -> Tensor:
        return outputs.float() * self.std.to(outputs.device) + self.mean.to(outputs.device)

    def statistics(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """For each value: the number of images, and sums of the absolute and the squared error, of the value minus its
        mean, and of the square of that difference; flattened."""
        error = predictions.double() - labels.double()
        value = labels.double() - self.mean.to(labels.device)
        return torch.stack([torch.ones_like(value), error.abs(), error**2, value, value**2]).sum(1).flatten()

    def scores(self, statistics: Tensor) -> dict[str, float]:
        """R2 (0 if all values are equal), mean absolute error and root mean squared error, each a mean over the
        values."""
        count, size, square, value, value_square = statistics.view(5, -1).double()
        spread = value_square - value**2 / count
        r2 = torch.where(spread > 1e-12 * value_square, 1 - square / spread, 0.0)
        return {
            "r2": r2.mean().item(),
            "mae": (size / count).mean().item(),
            "rmse": (square / count).sqrt().mean().item(),
        }

    def details(self, statistics: Tensor) -> list[float]:
        """Mean absolute error of each value."""
        count, size = statistics.view(5, -1)[:2]
        return [float(mean) for mean in size / count]

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        layer = last_layer(model, len(self.mean))
        layer.weight.mul_(self.std.to(layer.weight.device)[:, None])
        layer.bias.mul_(self.std.to(layer.bias.device)).add_(self.mean.to(layer.bias.device))
        self.mean, self.std = torch.zeros_like(self.mean), torch.ones_like(self.std)


def make_goal(config: TrainConfig, task: Any, model: nn.Module | None = None) -> Goal:
    """The goal of a configuration.

    Args:
        config: names the kind of task.
        task: the data.
        model: the model to train; None to evaluate only. If it is given, its head is checked, and the values of a
            regression are standardized by the training images, provided that these have an array ``values``.

    Raises:
        ValueError: the model's head does not suit the goal, or a value is equal in all training images.
    """
    if config.task == "classification":
        return Classification()
    if config.task == "segmentation":
        return Segmentation(task.classes)
    mean, std = torch.zeros(task.classes), torch.ones(task.classes)
    if model is not None:
        last_layer(model, task.classes)
        data = task.trainval if config.protocol == "final" else task.train
        values = getattr(getattr(data, "images", None), "values", None)
        if values is not None:
            own = values[data.indices]
            mean, std = torch.from_numpy(own.mean(0)), torch.from_numpy(own.std(0))
            constant = [name for name, width in zip(task.class_names, np.ptp(own, axis=0), strict=True) if width == 0]
            if constant:
                raise ValueError(f"{', '.join(constant)} is the same in all training images: there is nothing to learn")
    return Regression(mean, std, config.regression_loss)


def last_layer(model: nn.Module, values: int) -> nn.Linear:
    """The linear layer that computes a model's outputs.

    Raises:
        ValueError: the model's head has no linear layer with a bias and that number of outputs.
    """
    heads = [model.get_submodule(name) for name in find_head(model, None)]
    linear = [m for head in heads for m in head.modules() if isinstance(m, nn.Linear) and m.bias is not None]
    if not linear or linear[-1].out_features != values:
        raise ValueError(
            f"regression of {values} values needs a head that ends in a linear layer with bias and as many outputs; "
            f"this {type(model).__name__} has {heads or 'no head'}"
        )
    return linear[-1]


def score_text(scores: Mapping[str, float]) -> str:
    """Formats scores in one line: shares in percent, others as numbers."""
    shares = ("accuracy", "pixel_accuracy", "miou")
    return ", ".join(f"{k} {f'{v:.2%}' if k in shares else f'{v:.4g}'}" for k, v in scores.items())
