"""Any folder of images sorted into one folder per class.

Two layouts are read: ``train/``, ``test/`` and perhaps ``val/``, each with class folders; or class folders alone,
which are then divided. Images lie anywhere below their class folder.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from efft.data.splits import Indices, duplicate_groups, file_keys, stratified_split
from efft.data.task import FileImages, Split, Splits, TaskInfo

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
TEST_SHARE, VAL_SHARE = 0.2, 0.2  # of all images; of what is left for training


def read(folder: Path, seed: int) -> tuple[TaskInfo, Splits]:
    """The roles of a folder.

    - Class folders alone: a fifth of every class is the test set, always the same one.
    - No ``val/``: a fifth of the remaining training images, chosen by seed, is the validation set.

    Copies of one image stay on one side of every division made here.

    Raises:
        ValueError: The folder has neither layout, a class lacks images, or the given ``train/`` and ``test/`` share
            images; the message says what was found.
    """
    parts = {name: folder / name for name in ("train", "val", "test") if (folder / name).is_dir()}
    if not parts:
        return _divide(folder, seed)
    for required in ("train", "test"):
        if required not in parts:
            raise ValueError(
                f"{folder} has {', '.join(f'{name}/' for name in parts)} but no {required}/: expected train/, test/ "
                "and perhaps val/, or class folders alone"
            )
    names = _classes(parts["train"])
    train, test = _images(parts["train"], names), _images(parts["test"], names)
    if "val" in parts:
        val = _images(parts["val"], names)
        images = FileImages([*train.paths, *val.paths], [*train.labels.tolist(), *val.labels.tolist()])
        chosen = [np.arange(len(train.paths)), np.arange(len(train.paths), len(images.paths))]
    else:
        images = train
        groups = duplicate_groups(file_keys(images.paths))
        chosen = _with_validation(images, np.arange(len(images.paths)), groups, seed)
    _refuse_shared(images, test, folder)
    return _task(folder, names, images, chosen, Split(test, np.arange(len(test.paths))))


def _divide(folder: Path, seed: int) -> tuple[TaskInfo, Splits]:
    names = _classes(folder)
    images = _images(folder, names)
    few = [f"{name} ({count})" for name, count in zip(names, np.bincount(images.labels), strict=True) if count < 3]
    if few:
        raise ValueError(f"dividing {folder} into train, val and test needs 3 images per class; too few: {few}")
    groups = duplicate_groups(file_keys(images.paths))
    size = max(round(TEST_SHARE * len(groups)), len(names))
    (test,) = stratified_split(images.labels, [size], 0, groups)
    rest = np.delete(np.arange(len(groups)), test)
    chosen = _with_validation(images, rest, groups, seed)
    return _task(folder, names, images, chosen, Split(images, test))


def _with_validation(images: FileImages, pool: Indices, groups: Indices, seed: int) -> list[Indices]:
    classes = len(set(images.labels.tolist()))
    val_size = max(round(VAL_SHARE * len(pool)), classes)
    (val,) = stratified_split(images.labels[pool], [val_size], seed, groups[pool])
    return [np.delete(pool, val), pool[val]]


def _task(
    folder: Path, names: Sequence[str], images: FileImages, chosen: list[Indices], test: Split
) -> tuple[TaskInfo, Splits]:
    train, val = chosen
    info = TaskInfo(folder.resolve().name, None, len(names), f"folder {folder}", "your own", tuple(names))
    return info, {
        "train": Split(images, train),
        "val": Split(images, val),
        "trainval": Split(images, np.sort(np.concatenate([train, val]))),
        "test": test,
    }


def _classes(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(names) < 2:
        files = sorted(path.name for path in folder.iterdir() if path.is_file())
        raise ValueError(
            f"expected at least two class folders with images in {folder}; found the folders {names} "
            f"and {len(files)} files{f' ({files[0]}, ...)' if files else ''}"
        )
    return names


def _images(folder: Path, names: Sequence[str]) -> FileImages:
    """Images of all classes, sorted by class and path."""
    unknown = sorted({path.name for path in folder.iterdir() if path.is_dir()} - set(names))
    if unknown:
        raise ValueError(f"{folder} has class folders that train/ has not: {', '.join(unknown)}")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        if not found:
            others = sorted({path.suffix for path in (folder / name).rglob("*") if path.is_file()})
            raise ValueError(
                f"no images in {folder / name}: expected {', '.join(SUFFIXES)}; found {others or 'no files'}"
            )
        paths += found
        labels += [label] * len(found)
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
