"""Define the loss, the predictions and the scores for each kind of task.

A goal is an object for one kind of task, such as classification. It computes scores from statistics. Statistics are
sums over images. They can therefore be added up over batches and processes.
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

IGNORED = 255  # label of the mask pixels that the loss and the scores ignore


class Goal(Protocol):
    """The interface of all goals.

    Attributes:
        score: name of the score that selects the best epoch. A higher score is better.
    """

    score: str

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of a batch from the outputs of the model. The result is a scalar."""

    def predict(self, outputs: Tensor) -> Tensor:
        """Convert outputs of the model to predictions [batch, ...], which can be compared with labels."""

    def statistics(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """Compute the statistics of a batch, a one-dimensional tensor, from predictions and labels [batch, ...]."""

    def scores(self, statistics: Tensor) -> dict[str, float]:
        """Compute the scores by name from the sum of the statistics of all batches."""

    def details(self, statistics: Tensor) -> list[float]:
        """Compute one score for each class (segmentation) or value (regression). The list is empty otherwise."""

    def finish(self, model: nn.Module) -> None:
        """Change a trained model in place so that its outputs have the units of the labels.

        Only regression needs a change.
        """


class Classification:
    """Predict one class per image, from outputs [batch, classes] and labels [batch]."""

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
    """Predict one class per pixel, from outputs [batch, classes, height, width] and labels [batch, height, width].

    Pixels with label 255 are ignored.
    """

    score = "miou"

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        total = functional.cross_entropy(outputs, labels, ignore_index=IGNORED, reduction="sum")
        return total / (labels != IGNORED).sum().clamp(min=1)

    def predict(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(1)

    def statistics(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """Compute the confusion matrix of pixel counts, flattened.

        Rows are true classes, and columns are predicted classes.
        """
        cells = self.classes**2
        pairs = torch.where(labels == IGNORED, cells, labels * self.classes + predictions)
        return torch.bincount(pairs.flatten(), minlength=cells + 1)[:cells]

    def scores(self, statistics: Tensor) -> dict[str, float]:
        """Compute the pixel accuracy and the mean intersection over union.

        The mean is over the classes that occur in the labels or in the predictions.
        """
        table = statistics.view(self.classes, self.classes).double()
        shares = self._shares(table)
        accuracy = (table.trace() / table.sum()).item() if table.sum() else 0.0
        known = shares[~shares.isnan()]
        return {"miou": known.mean().item() if len(known) else 0.0, "pixel_accuracy": accuracy}

    def details(self, statistics: Tensor) -> list[float]:
        """Compute the intersection over union of each class.

        It is NaN for a class that occurs neither in the labels nor in the predictions.
        """
        return [float(share) for share in self._shares(statistics.view(self.classes, self.classes).double())]

    def _shares(self, table: Tensor) -> Tensor:
        right = table.diagonal()
        return right / (table.sum(0) + table.sum(1) - right)

    def finish(self, model: nn.Module) -> None:
        pass


class Regression:
    """Predict one or more numbers (values) for each image, from outputs [batch, values] and labels [batch, values].

    The model learns the standardized value, which is the value minus ``mean``, divided by ``std``. The same learning
    rates therefore suit values of any size. After training, :meth:`finish` changes the weights of the last layer so
    that the model computes the values themselves.

    Args:
        mean, std: mean and standard deviation of each value over the training images, [values].
        norm: name of the loss, "mse" or "l1".
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
        """Compute five sums over the images for each value, [5, values] flattened.

        The sums are the number of images and the sums of the absolute error, the squared error, the difference between
        the label and ``mean``, and the square of that difference.
        """
        error = predictions.double() - labels.double()
        value = labels.double() - self.mean.to(labels.device)
        return torch.stack([torch.ones_like(value), error.abs(), error**2, value, value**2]).sum(1).flatten()

    def scores(self, statistics: Tensor) -> dict[str, float]:
        """Compute R2, the mean absolute error and the root mean squared error, each averaged over the values.

        The R2 of a value is 0 if its labels are equal in all images.
        """
        count, size, square, value, value_square = statistics.view(5, -1).double()
        spread = value_square - value**2 / count
        r2 = torch.where(spread > 1e-12 * value_square, 1 - square / spread, 0.0)
        return {
            "r2": r2.mean().item(),
            "mae": (size / count).mean().item(),
            "rmse": (square / count).sqrt().mean().item(),
        }

    def details(self, statistics: Tensor) -> list[float]:
        """Compute the mean absolute error of each value."""
        count, size = statistics.view(5, -1)[:2]
        return [float(mean) for mean in size / count]

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        layer = last_layer(model, len(self.mean))
        layer.weight.mul_(self.std.to(layer.weight.device)[:, None])
        layer.bias.mul_(self.std.to(layer.bias.device)).add_(self.mean.to(layer.bias.device))
        self.mean, self.std = torch.zeros_like(self.mean), torch.ones_like(self.std)


def make_goal(config: TrainConfig, task: Any, model: nn.Module | None = None) -> Goal:
    """Create the goal of a configuration.

    Args:
        config: configuration that names the kind of task.
        task: the data.
        model: the model to train, or None for a goal that only evaluates. The model is used only for regression. Its
            last layer is checked. If the data provides the values of the training images as an array, the goal uses
            their mean and standard deviation. In all other cases, the goal uses mean 0 and standard deviation 1.

    Raises:
        ValueError: the last layer of the model is not suited for regression, or a value is the same in all training
            images.
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
    """Return the linear layer that computes a model's outputs.

    It is the last linear layer with a bias in the head of the model.

    Raises:
        ValueError: the head has no such layer, or the layer does not have ``values`` outputs.
    """
    heads = [model.get_submodule(name) for name in find_head(model, None)]
    linear = [m for head in heads for m in head.modules() if isinstance(m, nn.Linear) and m.bias is not None]
    if not linear or linear[-1].out_features != values:
        raise ValueError(
            f"regression of {values} values needs a head that ends in a linear layer with a bias and {values} outputs; "
            f"this {type(model).__name__} has {heads or 'no head'}"
        )
    return linear[-1]


def score_text(scores: Mapping[str, float]) -> str:
    """Format scores in one line. Accuracies and intersections over union are printed in percent."""
    shares = ("accuracy", "pixel_accuracy", "miou")
    return ", ".join(f"{k} {f'{v:.2%}' if k in shares else f'{v:.4g}'}" for k, v in scores.items())
