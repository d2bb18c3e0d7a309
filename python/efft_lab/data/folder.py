"""Read a folder of images that has one subfolder per class.

The folder either contains the class folders, or it is divided into the parts training, validation and test. In the
second case, it contains one folder per part, and each of these contains class folders. If validation or test images are
not given, they are taken from the training images. Images can be anywhere below their class folder. Hidden files and
folders (such as ``.ipynb_checkpoints``, ``._x.png`` and ``__MACOSX``) are ignored.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from efft_lab.data.fetch import notify
from efft_lab.data.pictures import SUFFIXES, check_readable, files, folders
from efft_lab.data.splits import Indices, duplicate_groups, file_keys, stratified_split
from efft_lab.data.task import FileImages, Kind, Split, Splits, TaskInfo

#: Accepted names for the folder of each part (upper or lower case).
PARTS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
TEST_SHARE, VAL_SHARE = 0.2, 0.2  # of the training images; the second share is of those that remain after the first


def read(folder: Path, seed: int) -> tuple[TaskInfo, Splits]:
    """Read the splits of a folder.

    - Without a test folder, about a fifth of the training images of each class becomes the test set. The same images
      are always selected.
    - Without a validation folder, about a fifth of the remaining training images of each class becomes the validation
      set. ``seed`` selects these images.

    When images are selected, identical files always stay in the same split. Every file is opened now, so that files
    that cannot be read are reported before training starts.

    Raises:
        ValueError: The folder has another layout, a class lacks images, files cannot be read, or an image is both in
            the test folder and in the training or validation folder. The message describes the files that were found.
    """
    parts = find_parts(folder)
    names = _classes(parts.get("train", folder))
    images = {part: _images(place, names) for part, place in (parts or {"train": folder}).items()}
    return describe(folder, "classification", names), roles(folder, images, names, seed)


def describe(folder: Path, kind: Kind, names: Sequence[str]) -> TaskInfo:
    """Return the description of a user's own folder or file with the given names of classes or values."""
    name = folder.stem if folder.is_file() else folder.resolve().name
    return TaskInfo(name, None, len(names), f"folder {folder}", "your own", tuple(names), kind=kind)


def roles(folder: Path, parts: Mapping[str, FileImages], names: Sequence[str], seed: int) -> Splits:
    """Return the splits "train", "val", "trainval" (both together) and "test".

    If ``parts`` lacks "val" or "test", these images are selected from "train", see :func:`read`.

    Args:
        folder: folder of the images, for messages.
        parts: the images of "train", and those of "val" and "test" if they are given.
        names: names of the classes, ordered by label, for messages.
        seed: seed for selecting validation images, if they are not given.
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
            notify(f"{folder} has no test part: a fifth of the training images becomes the test set")
        # Copies of validation images must not be in the test set.
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
    """Return a mapping from each part to its folder, or an empty mapping if the folder is not divided into parts.

    If only one subfolder has the name of a part, this subfolder may be a class with that name. It is treated as a class
    if there are other subfolders and if it has no subfolders itself.

    Raises:
        ValueError: one part has two folders, or the folder for training is missing.
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
            "val/ and test/, or only class folders"
        )
    return {part: paths[0] for part, paths in parts.items()}


def _divide(
    labels: Indices, pool: Indices, free: Indices, groups: Indices, size: int, seed: int
) -> tuple[Indices, Indices]:
    """Draw images from a pool in proportion to the class sizes. Return the remaining and the drawn positions.

    Positions are indices into ``labels``.

    Args:
        labels: labels of all images, [n].
        pool: positions of the images in the pool.
        free: positions in the pool that may be drawn.
        groups: group numbers of all images, [n]. Identical images have the same number and stay together.
        size: number of images to draw. It is increased to the number of classes if it is smaller.
        seed: seed for the selection.
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
    """Return the images of all classes, sorted by class and path."""
    unknown = sorted({path.name for path in folders(folder)} - set(names))
    if unknown:
        raise ValueError(f"{folder} has class folders that train/ does not have: {', '.join(unknown)}")
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
