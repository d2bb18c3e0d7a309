"""Accuracy of predictors that understand nothing about an image: what a model's accuracy has to be read against."""

import numpy as np
import numpy.typing as npt

from efft.data.task import ImageDataset, TaskData

_SIDE = 16  # pixels of the thumbnails
_PENALTIES = (1e1, 1e2, 1e3, 1e4, 1e5)

Floats = npt.NDArray[np.float64]


def trivial_baselines(task: TaskData) -> dict[str, float]:
    """Test accuracy in percent of three predictors that see no objects.

    - ``majority``: the most frequent class of trainval.
    - ``ink``: nearest class mean of one number, how far the pixels are from the image's median colour on average.
    - ``pixels``: ridge regression on 16 x 16 thumbnails, its penalty chosen on val, then fitted on trainval.
    """
    thumbnails = {
        role: _thumbnails(data)
        for role, data in (("train", task.train), ("val", task.val), ("trainval", task.trainval), ("test", task.test))
    }
    truth = task.test.labels

    majority = np.bincount(task.trainval.labels).argmax()
    return {
        "majority": _percent(np.full_like(truth, majority), truth),
        "ink": _percent(
            _nearest_mean(_ink(thumbnails["trainval"]), task.trainval.labels, _ink(thumbnails["test"])), truth
        ),
        "pixels": _percent(_pixels(task, thumbnails), truth),
    }


def _percent(predicted: npt.NDArray[np.int64], truth: npt.NDArray[np.int64]) -> float:
    return 100 * float((predicted == truth).mean())


def _thumbnails(data: ImageDataset) -> Floats:  # [n, pixels, 3]
    images = [np.asarray(data.raw(index).resize((_SIDE, _SIDE), resample=4)) for index in range(len(data))]
    return np.stack(images).reshape(len(images), -1, 3) / 255  # resample 4: box filter, keeps the mean


def _ink(images: Floats) -> Floats:  # [n]
    return np.abs(images - np.median(images, axis=1, keepdims=True)).mean(axis=(1, 2))


def _nearest_mean(values: Floats, labels: npt.NDArray[np.int64], queries: Floats) -> npt.NDArray[np.int64]:
    classes = np.unique(labels)
    means = np.array([values[labels == label].mean() for label in classes])
    return classes[np.abs(queries[:, None] - means).argmin(axis=1)]


def _pixels(task: TaskData, thumbnails: dict[str, Floats]) -> npt.NDArray[np.int64]:
    def accuracy(penalty: float) -> float:
        predicted = _ridge(thumbnails["train"], task.train.labels, thumbnails["val"], penalty)
        return _percent(predicted, task.val.labels)

    best = max(_PENALTIES, key=accuracy)
    return _ridge(thumbnails["trainval"], task.trainval.labels, thumbnails["test"], best)


def _ridge(images: Floats, labels: npt.NDArray[np.int64], queries: Floats, penalty: float) -> npt.NDArray[np.int64]:
    """Classes of the queries by least squares on one-hot targets, with standardised inputs."""
    flat = images.reshape(len(images), -1)
    mean, std = flat.mean(axis=0), flat.std(axis=0) + 1e-6
    x, q = (flat - mean) / std, (queries.reshape(len(queries), -1) - mean) / std
    targets = np.eye(labels.max() + 1)[labels]
    offset = targets.mean(axis=0)
    weights = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ (targets - offset))
    return np.asarray((q @ weights + offset).argmax(axis=1))
