"""Store prepared image sets on disk.

Each set is one compressed file with a training pool and a fixed test set. A seed selects training and validation images
from the pool.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from efft.saving.files import replacing
from efft_lab.data.splits import stratified_split
from efft_lab.data.task import ArrayImages, Split, Splits

TRAIN, VAL = 800, 200  # number of training and validation images, as in VTAB-1K


class Prepared(NamedTuple):
    """The content of the file of a prepared image set."""

    pool_images: npt.NDArray[np.uint8]  # [n, height, width] or [n, height, width, 3]
    pool_labels: npt.NDArray[Any]  # [n]
    test_images: npt.NDArray[np.uint8]  # [m, height, width] or [m, height, width, 3]
    test_labels: npt.NDArray[Any]  # [m]


def load_or_build(path: Path, build: Callable[[], Prepared]) -> Prepared:
    """Read a prepared set from a file. If the file does not exist, build the set and write the file first.

    Other processes never see an incomplete file.

    Raises:
        RuntimeError: The file is damaged.
    """
    if not path.exists():
        prepared = build()
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.savez_compressed(file, **prepared._asdict())
    try:
        with np.load(path, allow_pickle=False) as file:
            return _checked(Prepared(*(file[name] for name in Prepared._fields)))
    except Exception as error:  # a damaged archive can raise nearly anything
        raise RuntimeError(f"the prepared set {path} is damaged ({error}); delete it and try again") from error


def _checked(prepared: Prepared) -> Prepared:
    """Return a prepared set. Raise an error if its arrays have other shapes or dtypes than :class:`Prepared` states."""
    for images, labels in (prepared[:2], prepared[2:]):
        colors = images.shape[3:]
        if images.dtype != np.uint8 or images.ndim < 3 or colors not in ((), (3,)):
            raise ValueError(
                f"expected images of 8 bits, [n, height, width] or [n, height, width, 3], got {images.shape}"
            )
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            raise ValueError(f"expected {len(images)} integer labels, got {labels.dtype} {list(labels.shape)}")
    return prepared


def vtab_style_splits(prepared: Prepared, seed: int) -> Splits:
    """Return the splits of a prepared set, with 800 training and 200 validation images that the seed selects."""
    pool = ArrayImages(prepared.pool_images, prepared.pool_labels)
    test = ArrayImages(prepared.test_images, prepared.test_labels)
    train, val = stratified_split(pool.labels, [TRAIN, VAL], seed)
    return {
        "train": Split(pool, train),
        "val": Split(pool, val),
        "trainval": Split(pool, np.sort(np.concatenate([train, val]))),
        "test": Split(test, np.arange(len(test.labels))),
    }
