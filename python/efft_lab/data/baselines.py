"""Compute the accuracy of trivial predictors, as a reference for the accuracy of models.

Trivial predictors do not recognize objects. They use at most thumbnails, images that are reduced to 16 x 16 pixels.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from efft_lab.data.task import ImageDataset, TaskData

_SIDE = 16  # height and width of the thumbnails in pixels
_PENALTIES = (1e1, 1e2, 1e3, 1e4, 1e5)
_NEIGHBORS = (1, 3, 5, 9, 15)

Floats = npt.NDArray[np.float64]


def trivial_baselines(task: TaskData) -> dict[str, float]:
    """Return the test accuracy in percent of three trivial predictors.

    - ``majority`` predicts the most frequent class of the split ``trainval``.
    - ``ink`` computes one number for each thumbnail, the mean distance of its pixels from its median color. It predicts
      the class whose mean of this number in ``trainval`` is nearest.
    - ``pixels`` is ridge regression on thumbnails. The penalty is selected on ``val``, and the weights are fitted to
      ``trainval``.
    """
    thumbnails = _all_thumbnails(task)
    predictions = {
        "majority": np.full_like(task.test.labels, np.bincount(task.trainval.labels).argmax()),
        "ink": _nearest_mean(_ink(thumbnails["trainval"]), task.trainval.labels, _ink(thumbnails["test"])),
        "pixels": _chosen(_ridge, _PENALTIES, task, thumbnails),
    }
    return {name: _percent(predicted, task.test.labels) for name, predicted in predictions.items()}


def nearest_neighbors(task: TaskData) -> float:
    """Return the test accuracy in percent of a vote of the k nearest thumbnails in the split ``trainval``.

    The number k is selected on the split ``val``.
    """
    return _percent(_chosen(_vote, _NEIGHBORS, task, _all_thumbnails(task)), task.test.labels)


def _all_thumbnails(task: TaskData) -> dict[str, Floats]:
    roles = (("train", task.train), ("val", task.val), ("trainval", task.trainval), ("test", task.test))
    return {role: _thumbnails(data) for role, data in roles}


def _percent(predicted: npt.NDArray[np.int64], truth: npt.NDArray[np.int64]) -> float:
    return 100 * float((predicted == truth).mean())


def _thumbnails(data: ImageDataset) -> Floats:  # [n, pixels, 3]
    images = [np.asarray(data.raw(index).resize((_SIDE, _SIDE), resample=4)) for index in range(len(data))]
    return np.stack(images).reshape(len(images), -1, 3) / 255  # resample=4 is a box filter, which keeps the mean


def _ink(images: Floats) -> Floats:  # [n]
    return np.abs(images - np.median(images, axis=1, keepdims=True)).mean(axis=(1, 2))


def _nearest_mean(values: Floats, labels: npt.NDArray[np.int64], queries: Floats) -> npt.NDArray[np.int64]:
    classes = np.unique(labels)
    means = np.array([values[labels == label].mean() for label in classes])
    return classes[np.abs(queries[:, None] - means).argmin(axis=1)]


def _chosen(
    predict: Callable[..., npt.NDArray[np.int64]],
    settings: Sequence[float],
    task: TaskData,
    thumbnails: dict[str, Floats],
) -> npt.NDArray[np.int64]:
    """Return the predictions for the test split with the setting that is best on the validation split."""

    def accuracy(setting: float) -> float:
        predicted = predict(thumbnails["train"], task.train.labels, thumbnails["val"], setting)
        return _percent(predicted, task.val.labels)

    best = max(settings, key=accuracy)
    return predict(thumbnails["trainval"], task.trainval.labels, thumbnails["test"], best)


def _vote(images: Floats, labels: npt.NDArray[np.int64], queries: Floats, k: int) -> npt.NDArray[np.int64]:
    """Predict the classes of the queries by a vote of the k nearest images. A tie selects the smallest class number."""
    x, q = images.reshape(len(images), -1), queries.reshape(len(queries), -1)
    distances = (x**2).sum(axis=1) - 2 * q @ x.T  # [queries, images], up to a constant per query
    nearest = labels[np.argsort(distances, axis=1, kind="stable")[:, :k]]
    return np.array([np.bincount(row).argmax() for row in nearest], dtype=np.int64)


def _ridge(images: Floats, labels: npt.NDArray[np.int64], queries: Floats, penalty: float) -> npt.NDArray[np.int64]:
    """Predict the classes of the queries by least squares on one-hot targets, with standardized inputs."""
    flat = images.reshape(len(images), -1)
    mean, std = flat.mean(axis=0), flat.std(axis=0) + 1e-6
    x, q = (flat - mean) / std, (queries.reshape(len(queries), -1) - mean) / std
    targets = np.eye(labels.max() + 1)[labels]
    offset = targets.mean(axis=0)
    weights = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ (targets - offset))
    return np.asarray((q @ weights + offset).argmax(axis=1))
