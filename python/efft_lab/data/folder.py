"""Any folder of images sorted into one folder per class.

Two layouts are read: folders for training, test and validation, each with class folders; or class folders alone.
What is missing is divided from the training images. Images lie anywhere below their class folder; what systems hide in
folders (``.ipynb_checkpoints``, ``._x.png``, ``__MACOSX``) does not count.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from efft_lab.data.fetch import notify
from efft_lab.data.pictures import SUFFIXES, check_readable, files, folders
from efft_lab.data.splits import Indices, duplicate_groups, file_keys, stratified_split
from efft_lab.data.task import FileImages, Kind, Split, Splits, TaskInfo

#: What the folder of a part may be called, in any case.
PARTS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
TEST_SHARE, VAL_SHARE = 0.2, 0.2  # of all images; of what is left for training


def read(folder: Path, seed: int) -> tuple[TaskInfo, Splits]:
    """The roles of a folder.

    - Class folders alone, or no test folder: a fifth of every class is the test set, always the same one.
    - No validation folder: a fifth of the remaining training images, chosen by seed, is the validation set.

    Copies of one image stay on one side of every division made here. Every file is opened once, so that one that cannot
    be read is named now and not in the middle of training.

    Raises:
        ValueError: The folder has neither layout, a class lacks images, files cannot be read, or the given training and
            test folders share images; the message says what was found.
    """
    parts = find_parts(folder)
    names = _classes(parts.get("train", folder))
    images = {part: _images(place, names) for part, place in (parts or {"train": folder}).items()}
    return describe(folder, "classification", names), roles(folder, images, names, seed)


def describe(folder: Path, kind: Kind, names: Sequence[str]) -> TaskInfo:
    """What is known about a user's own data, with the names of classes or values."""
    name = folder.stem if folder.is_file() else folder.resolve().name
    return TaskInfo(name, None, len(names), f"folder {folder}", "your own", tuple(names), kind=kind)


def roles(folder: Path, parts: Mapping[str, FileImages], names: Sequence[str], seed: int) -> Splits:
    """The parts that are given, and those that are missing divided from "train"; see `read`.

    Args:
        folder: where the images are, for messages.
        parts: "train", and "val" and "test" where these are given.
        names: of the classes, by label.
        seed: decides the validation images where they are not given.
    """
    train, test = parts["train"], parts.get("test")
    images, given_val = train, None
    if "val" in parts:
        images = train.joined(parts["val"])
        given_val = np.arange(len(train.paths), len(images.paths))
    every = [*images.paths, *(test.paths if test else [])]
    check_readable(every)
    notify(f"{folder}: {len(every)} images checked")
    groups = duplicate_groups(file_keys(images.paths))
    pool = np.arange(len(train.paths))
    if test is not None:
        _refuse_shared(images, test, folder)
        held = Split(test, np.arange(len(test.paths)))
    else:
        few = [f"{name} ({n})" for name, n in zip(names, np.bincount(train.labels), strict=False) if n < 3]
        if few:
            raise ValueError(f"dividing {folder} into train, val and test needs 3 images per class; too few: {few}")
        if given_val is not None:
            notify(f"{folder} has no test part: a fifth of the training images is kept apart for it")
        # Copies of images for validation cannot be tested on.
        free = pool if given_val is None else pool[~np.isin(groups[pool], groups[given_val])]
        pool, chosen = _divide(train.labels, pool, free, groups, round(TEST_SHARE * len(pool)), 0)
        held = Split(images, chosen)
    if given_val is None:
        pool, given_val = _divide(images.labels, pool, pool, groups, round(VAL_SHARE * len(pool)), seed)
    return {
        "train": Split(images, pool),
        "val": Split(images, given_val),
        "trainval": Split(images, np.sort(np.concatenate([pool, given_val]))),
        "test": held,
    }


def find_parts(folder: Path) -> dict[str, Path]:
    """The folders of a folder's parts; none where it is not divided.

    A single folder named like a part is a class where others lie beside it and it has no folders itself.

    Raises:
        ValueError: one part has two folders, or there is none for training.
    """
    inner = folders(folder)
    parts: dict[str, list[Path]] = {}
    for part, known in PARTS.items():
        found = [path for path in inner if path.name.lower() in known]
        if found:
            parts[part] = found
    found = [path for several in parts.values() for path in several]
    if not found or (len(found) == 1 < len(inner) and not folders(found[0])):
        return {}
    for part, several in parts.items():
        if len(several) > 1:
            listed = ", ".join(f"{path.name}/" for path in several)
            raise ValueError(f"{folder} has {listed} for the part {part!r}: keep one of them")
    if "train" not in parts:
        raise ValueError(
            f"{folder} has {', '.join(f'{path.name}/' for path in found)} but no train/: expected train/ and perhaps "
            "val/ and test/, or class folders alone"
        )
    return {part: paths[0] for part, paths in parts.items()}


def _divide(
    labels: Indices, pool: Indices, free: Indices, groups: Indices, size: int, seed: int
) -> tuple[Indices, Indices]:
    """What is left of a pool of positions, and what is drawn from it, in the class proportions.

    Args:
        labels: of all images, [n].
        pool: positions to draw from.
        free: those of them that may be drawn.
        groups: [n]; copies have the same number, and stay together.
        size: images to draw; at least one of each class.
        seed: decides which.
    """
    classes = len(set(labels[pool].tolist()))
    (chosen,) = stratified_split(labels[free], [min(max(size, classes), len(free))], seed, groups[free])
    drawn = free[chosen]
    return pool[~np.isin(pool, drawn)], drawn


def _classes(folder: Path) -> list[str]:
    names = [path.name for path in folders(folder)]
    if len(names) < 2:
        found = sorted(path.name for path in folder.iterdir() if path.is_file())
        raise ValueError(
            f"expected at least two class folders with images in {folder}; found the folders {names} "
            f"and {len(found)} files{f' ({found[0]}, ...)' if found else ''}"
        )
    return names


def _images(folder: Path, names: Sequence[str]) -> FileImages:
    """Images of all classes, sorted by class and path."""
    unknown = sorted({path.name for path in folders(folder)} - set(names))
    if unknown:
        raise ValueError(f"{folder} has class folders that train/ has not: {', '.join(unknown)}")
    paths: list[Path] = []
    labels: list[int] = []
    others: Counter[str] = Counter()
    for label, name in enumerate(names):
        every = files(folder / name)
        found = [path for path in every if path.suffix.lower() in SUFFIXES]
        ignored = Counter(path.suffix for path in every if path.suffix.lower() not in SUFFIXES)
        if not found:
            raise ValueError(
                f"no images in {folder / name}: expected {', '.join(SUFFIXES)}; found {sorted(ignored) or 'no files'}"
            )
        paths += found
        labels += [label] * len(found)
        others += ignored
    if others:
        listed = ", ".join(f"{suffix or 'without ending'} ({count})" for suffix, count in sorted(others.items()))
        notify(f"{folder}: ignored files that are not images: {listed}")
    return FileImages(paths, labels)


def _refuse_shared(train: FileImages, test: FileImages, folder: Path) -> None:
    groups = duplicate_groups(file_keys([*train.paths, *test.paths]))
    cut = len(train.paths)
    shared = np.flatnonzero(np.isin(groups[cut:], groups[:cut]))
    if len(shared):
        example = test.paths[shared[0]]
        twin = train.paths[int(np.flatnonzero(groups[:cut] == groups[cut + shared[0]])[0])]
        raise ValueError(
            f"{len(shared)} test images of {folder} are also training images, e.g. {example} is a copy of {twin}: "
            "the test accuracy would be wrong. Remove one of the copies"
        )
