"""Segmentation: a folder of images and a folder of masks with the same names.

``images/a/1.jpg`` belongs to ``masks/a/1.png``. The two folders lie side by side, or so in each of ``train/``,
``val/`` and ``test/``, or have these inside (``images/train/``, ``masks/train/``); `efft_lab.data.folder` says what
parts may be called and what is done about missing ones. A mask has one channel of class numbers from 0 on, in 1, 8 or
16 bits or as a palette; 255 is a pixel that does not count. ``classes.txt`` beside the folders may name the classes,
one per line.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from efft_lab.data.fetch import notify
from efft_lab.data.folder import describe, find_parts, roles
from efft_lab.data.pictures import folders, pictures, pillow, size_upright
from efft_lab.data.task import IGNORED, FileImages, Splits, TaskInfo

IMAGES, MASKS = ("images", "image"), ("masks", "mask", "annotations", "labels")
NAMES = "classes.txt"
_MODES = ("1", "L", "P", "I;16", "I;16B", "I")
_SPREAD = {"L;2": 85, "L;4": 17}  # by which Pillow multiplies grey values of 2 and 4 bits


class MaskedImages(FileImages):
    """Image files with a mask each.

    Args:
        paths, masks: one file of each per image.
    """

    def __init__(self, paths: Sequence[Path], masks: Sequence[Path]) -> None:
        super().__init__(paths, [0] * len(paths))
        self.masks = list(masks)

    def joined(self, other: FileImages) -> "MaskedImages":
        assert isinstance(other, MaskedImages)
        return MaskedImages([*self.paths, *other.paths], [*self.masks, *other.masks])

    def target(self, index: int, image_size: int) -> torch.Tensor:
        """Class of each pixel, [image_size, image_size], by the nearest pixel of the mask."""
        with pillow().open(self.masks[index]) as mask:
            numbers = pillow().fromarray(_numbers(mask).astype(np.int32))
        resized = numbers.resize((image_size, image_size), pillow().Resampling.NEAREST)
        return torch.from_numpy(np.array(resized)).long()


def read(folder: Path, seed: int) -> tuple[TaskInfo, Splits]:
    """The roles of a folder; every image is opened, and every mask read, before anything is trained.

    Raises:
        ValueError: the folder has another layout, files without a partner, files that cannot be read, masks of another
            size than their image or with unusable classes; the message says what was found.
    """
    parts = find_parts(folder)
    if parts:
        places = {part: (_one(place, IMAGES), _one(place, MASKS)) for part, place in parts.items()}
    else:
        images, masks = _one(folder, IMAGES), _one(folder, MASKS)
        inner = find_parts(images)
        places = {part: (place, masks / place.name) for part, place in inner.items()} or {"train": (images, masks)}
    pairs = {part: _pairs(*place) for part, place in places.items()}
    splits = roles(folder, pairs, ["of all"], seed)
    names = _class_names(folder, list(pairs.values()))
    return describe(folder, "segmentation", names), splits


def _one(folder: Path, known: Sequence[str]) -> Path:
    found = [path for path in folders(folder) if path.name.lower() in known]
    if len(found) != 1:
        here = ", ".join(f"{path.name}/" for path in folders(folder)) or "no folders"
        raise ValueError(f"expected one folder {known[0]}/ in {folder} (beside images/ or masks/), found {here}")
    return found[0]


def _pairs(images: Path, masks: Path) -> MaskedImages:
    """Every image with its mask, sorted by name."""
    ours, theirs = (
        {str(path.relative_to(place).with_suffix("")): path for path in pictures(place)} for place in (images, masks)
    )
    missing = sorted(ours.keys() - theirs.keys())
    if missing or not ours:
        found = f"{len(missing)} of {len(ours)} have none, e.g. {ours[missing[0]]}" if missing else "found no images"
        raise ValueError(f"expected a mask of the same name in {masks} for every image in {images}; {found}")
    if len(ours) < len(pictures(images)) or len(theirs) < len(pictures(masks)):
        raise ValueError(f"files in {images} or {masks} differ by their endings alone: give each image its own name")
    extra = sorted(theirs.keys() - ours.keys())
    if extra:
        notify(f"{masks}: ignored {len(extra)} masks without an image, e.g. {theirs[extra[0]].name}")
    names = sorted(ours)
    return MaskedImages([ours[name] for name in names], [theirs[name] for name in names])


def _class_names(folder: Path, parts: Sequence[MaskedImages]) -> list[str]:
    """Reads all masks in parallel; names from the file if there is one, else the numbers that occur."""
    pairs = [pair for part in parts for pair in zip(part.paths, part.masks, strict=True)]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda pair: _classes_of(*pair), pairs))
    problems = [problem for problem in found if isinstance(problem, str)]
    if problems:
        more = f"; ... ({len(problems)} in all)" if len(problems) > 5 else ""
        raise ValueError(f"{len(problems)} of {len(pairs)} masks cannot be used: {'; '.join(problems[:5])}{more}")
    numbers = set().union(*(classes for classes in found if not isinstance(classes, str)))
    count = max(numbers - {IGNORED}, default=0) + 1
    if (folder / NAMES).is_file():
        names = [line.strip() for line in (folder / NAMES).read_text(encoding="utf-8").splitlines() if line.strip()]
        if count > len(names):
            raise ValueError(f"{folder / NAMES} names {len(names)} classes, but masks have class {count - 1}")
    else:
        names = [str(number) for number in range(count)]
    if len(names) < 2 or len(names) > IGNORED:
        raise ValueError(
            f"expected 2 to {IGNORED} classes, numbered from 0, found the numbers {sorted(numbers)[:9]} in the masks "
            f"of {folder}; {IGNORED} is a pixel that does not count, so masks of two classes have 0 and 1"
        )
    return names


def _classes_of(image_path: Path, mask_path: Path) -> set[int] | str:
    """The numbers in a mask, or why it cannot be used."""
    try:
        with pillow().open(image_path) as image, pillow().open(mask_path) as mask:
            numbers = _numbers(mask)
            width, height = size_upright(image)
            if numbers.shape != (height, width):
                return (
                    f"{mask_path}: expected {width} x {height} pixels like its image, got {mask.width} x {mask.height}"
                )
            return set(np.unique(numbers).tolist())
    except Exception as error:  # Pillow has many
        return f"{mask_path}: {error}"


def _numbers(mask: Any) -> np.typing.NDArray[np.int64]:
    """Class numbers, [height, width].

    Raises:
        ValueError: it has several channels, or numbers that are not classes.
    """
    if mask.mode not in _MODES:
        raise ValueError(
            f"expected one channel of class numbers (8 or 16 bits, 1 bit, or a palette), got the mode {mask.mode}"
        )
    if mask.format == "JPEG":
        raise ValueError("JPEG changes the numbers at every edge; store masks as PNG")
    stored: Any = mask.tile[0][3] if mask.tile else None
    spread = _SPREAD.get(stored[0] if isinstance(stored, tuple) else stored, 1)
    numbers = np.asarray(mask).astype(np.int64) // spread
    if numbers.min() < 0 or numbers.max() > IGNORED:
        raise ValueError(f"expected class numbers from 0 to {IGNORED}, got {numbers.min()} to {numbers.max()}")
    return numbers
