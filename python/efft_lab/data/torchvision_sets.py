"""Load data sets of torchvision.

A seed selects 800 training and 200 validation images. The test set is the official test set. EuroSAT has no official
test set, so a fixed part of its images is used. torchvision downloads the sets from their original hosts, which needs a
network. StanfordCars is not included, because its original address no longer works.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from efft_lab.data.fetch import notify
from efft_lab.data.splits import duplicate_groups, file_keys, stratified_split
from efft_lab.data.store import TRAIN, VAL
from efft_lab.data.task import Images, Split, Splits, TaskInfo

FOLDER = "torchvision"
_PREFIX = "torchvision:"
_EUROSAT_TEST_SHARE = 0.2  # share of EuroSAT's images that form the test set


@dataclass(frozen=True)
class _Set:
    constructor: str  # class in torchvision.datasets
    train: tuple[str, ...]  # official splits that make up the training data
    labels: str  # attribute of the torchvision data set that holds all labels
    marker: str  # the last file or folder that torchvision writes; if it exists, the set is complete
    classes: int
    license: str
    selector: Literal["train", "split", None] = "split"  # constructor argument that selects the official split
    non_commercial: bool = False

    def arguments(self, split: str) -> dict[str, Any]:
        if self.selector is None:
            return {}
        return {self.selector: split if self.selector == "split" else split == "train"}


_SETS = {
    "cifar10": _Set("CIFAR10", ("train",), "targets", "cifar-10-batches-py", 10, "none stated", "train"),
    "cifar100": _Set("CIFAR100", ("train",), "targets", "cifar-100-python", 100, "none stated", "train"),
    "mnist": _Set("MNIST", ("train",), "targets", "MNIST/raw/t10k-labels-idx1-ubyte", 10, "none stated", "train"),
    "fashion-mnist": _Set(
        "FashionMNIST", ("train",), "targets", "FashionMNIST/raw/t10k-labels-idx1-ubyte", 10, "MIT", "train"
    ),
    "svhn": _Set("SVHN", ("train",), "labels", "test_32x32.mat", 10, "non-commercial", non_commercial=True),
    "flowers102": _Set("Flowers102", ("train", "val"), "_labels", "flowers-102/setid.mat", 102, "none stated"),
    "pets": _Set("OxfordIIITPet", ("trainval",), "_labels", "oxford-iiit-pet/annotations", 37, "CC-BY-SA-4.0"),
    "dtd": _Set("DTD", ("train", "val"), "_labels", "dtd/dtd", 47, "research"),
    "aircraft": _Set(
        "FGVCAircraft",
        ("trainval",),
        "_labels",
        "fgvc-aircraft-2013b",
        100,
        "non-commercial research",
        non_commercial=True,
    ),
    "food101": _Set("Food101", ("train",), "_labels", "food-101", 101, "research (images of Foodspotting)"),
    "eurosat": _Set("EuroSAT", ("all",), "targets", "eurosat/2750", 10, "MIT", None),
}

INFOS = {
    _PREFIX + name: TaskInfo(
        _PREFIX + name,
        "specialized" if name == "eurosat" else "natural",
        entry.classes,
        f"torchvision.datasets.{entry.constructor}",
        entry.license,
        non_commercial=entry.non_commercial,
    )
    for name, entry in _SETS.items()
}


class _TorchvisionImages(Images):
    """The concatenated images of one or more torchvision data sets."""

    def __init__(self, parts: list[Any], labels: str) -> None:
        self.parts = parts
        self.starts = np.cumsum([0] + [len(part) for part in parts])
        self.labels = np.concatenate([np.asarray(getattr(part, labels), dtype=np.int64) for part in parts])

    def image(self, index: int) -> Any:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[part][index - int(self.starts[part])][0].convert("RGB")


def path(name: str, root: Path) -> Path:
    """Return the path of a file or folder that exists if torchvision has downloaded the complete set."""
    return root / _SETS[name.removeprefix(_PREFIX)].marker


def read(name: str, root: Path, seed: int) -> tuple[TaskInfo, Splits]:
    """Read the splits of a set. Download the set first if ``root`` does not contain it.

    Official training and test data may have common images, because this function does not search for copies.

    Raises:
        ConnectionError: The download failed.
    """
    entry = _SETS[name.removeprefix(_PREFIX)]
    parts = [_open(name, entry, split, root) for split in entry.train]
    images = _TorchvisionImages(parts, entry.labels)
    pool = np.arange(len(images.labels))
    if entry.selector is None:
        test, pool = _hold_out(images, [Path(file) for file, _ in parts[0].samples])
    else:
        official = _TorchvisionImages([_open(name, entry, "test", root)], entry.labels)
        test = Split(official, np.arange(len(official.labels)))
    train, val = (pool[chosen] for chosen in stratified_split(images.labels[pool], [TRAIN, VAL], seed))
    names = tuple(str(label) for label in getattr(parts[0], "classes", ()))
    info = dataclasses.replace(INFOS[name], class_names=names if len(names) == entry.classes else None)
    return info, {
        "train": Split(images, train),
        "val": Split(images, val),
        "trainval": Split(images, np.sort(np.concatenate([train, val]))),
        "test": test,
    }


def _hold_out(images: Images, files: list[Path]) -> tuple[Split, Any]:
    """Return a fixed test set and the positions of the remaining images. Copies of one image are never separated."""
    groups = duplicate_groups(file_keys(files))
    (test,) = stratified_split(images.labels, [round(_EUROSAT_TEST_SHARE * len(files))], 0, groups)
    return Split(images, test), np.delete(np.arange(len(files)), test)


def _open(name: str, entry: _Set, split: str, root: Path) -> Any:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(f"{name} needs torchvision: pip install 'efft-kernels[vision]'") from error
    if not path(name, root).exists():
        notify(f"downloading {name} to {root}")
    try:
        return getattr(datasets, entry.constructor)(str(root), download=True, **entry.arguments(split))
    except (OSError, RuntimeError) as error:  # RuntimeError: torchvision found a damaged file
        raise ConnectionError(
            f"torchvision could not provide {name} ({error}). The download needs a network once. On a machine without "
            f"a network, copy {root} from another machine and pass its path as root=.... Packaged sets such as mnist5k "
            "come from package registries instead, and generated sets such as count need no download"
        ) from error
