"""Read segmentation data: a folder of images and a folder of masks with the same names.

For example, ``masks/a/1.png`` is the mask of ``images/a/1.jpg``. Three layouts are supported:

- The data folder contains ``images/`` and ``masks/``.
- The data folder contains ``train/``, ``val/`` and ``test/``, and each of these contains ``images/`` and ``masks/``.
- The data folder contains ``images/`` and ``masks/``, and each of these contains ``train/``, ``val/`` and ``test/``.

``train``, ``val`` and ``test`` are called parts. :mod:`efft_lab.data.folder` describes their names and what happens if
a part is missing. A mask has one channel of class numbers that start at 0. The numbers are stored in 1, 8 or 16 bits or
as the indices of a palette. Pixels with the number 255 are ignored. The data folder may contain a file ``classes.txt``,
which names the classes, one per line.
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
_SPREAD = {"L;2": 85, "L;4": 17}  # factors by which Pillow multiplies gray values that are stored in 2 and 4 bits


class MaskedImages(FileImages):
    """Image files, each with a mask.

    Args:
        paths, masks: one image file and one mask file per image.
    """

    def __init__(self, paths: Sequence[Path], masks: Sequence[Path]) -> None:
        super().__init__(paths, [0] * len(paths))
        self.masks = list(masks)

    def joined(self, other: FileImages) -> "MaskedImages":
        assert isinstance(other, MaskedImages)
        return MaskedImages([*self.paths, *other.paths], [*self.masks, *other.masks])

    def target(self, index: int, image_size: int) -> torch.Tensor:
        """Return the class of each pixel, int64 [image_size, image_size]. The mask is resized by nearest neighbors."""
        with pillow().open(self.masks[index]) as mask:
            numbers = pillow().fromarray(_numbers(mask).astype(np.int32))
        resized = numbers.resize((image_size, image_size), pillow().Resampling.NEAREST)
        return torch.from_numpy(np.array(resized)).long()


def read(folder: Path, seed: int) -> tuple[TaskInfo, Splits]:
    """Read the splits of a folder. Every image is opened and every mask is read before training starts.

    Raises:
        ValueError: the folder has another layout, an image has no mask, files cannot be read, a mask and its image have
            different sizes, or a mask has invalid classes. The message describes the files that were found.
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
        raise ValueError(f"expected one folder {known[0]}/ in {folder} for the {known[0]}, found {here}")
    return found[0]


def _pairs(images: Path, masks: Path) -> MaskedImages:
    """Return all images with their masks, sorted by name."""
    ours, theirs = (
        {str(path.relative_to(place).with_suffix("")): path for path in pictures(place)} for place in (images, masks)
    )
    missing = sorted(ours.keys() - theirs.keys())
    if missing or not ours:
        found = f"{len(missing)} of {len(ours)} have none, e.g. {ours[missing[0]]}" if missing else "found no images"
        raise ValueError(f"expected a mask of the same name in {masks} for every image in {images}; {found}")
    if len(ours) < len(pictures(images)) or len(theirs) < len(pictures(masks)):
        raise ValueError(f"files in {images} or {masks} differ only in their endings: give each image its own name")
    extra = sorted(theirs.keys() - ours.keys())
    if extra:
        notify(f"{masks}: ignored {len(extra)} masks without an image, e.g. {theirs[extra[0]].name}")
    names = sorted(ours)
    return MaskedImages([ours[name] for name in names], [theirs[name] for name in names])


def _class_names(folder: Path, parts: Sequence[MaskedImages]) -> list[str]:
    """Check all masks in parallel and return the names of the classes.

    The names come from ``classes.txt``. Without this file, they are the numbers from 0 to the largest class in a mask.
    """
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
            f"of {folder}; {IGNORED} marks ignored pixels, so masks of two classes have 0 and 1"
        )
    return names


def _classes_of(image_path: Path, mask_path: Path) -> set[int] | str:
    """Return the class numbers in a mask, or the reason why the mask cannot be used."""
    try:
        with pillow().open(image_path) as image, pillow().open(mask_path) as mask:
            numbers = _numbers(mask)
            width, height = size_upright(image)
            if numbers.shape != (height, width):
                return (
                    f"{mask_path}: expected {width} x {height} pixels like its image, got {mask.width} x {mask.height}"
                )
            return set(np.unique(numbers).tolist())
    except Exception as error:  # Pillow raises many types of errors
        return f"{mask_path}: {error}"


def _numbers(mask: Any) -> np.typing.NDArray[np.int64]:
    """Return the class numbers of a mask, [height, width].

    Raises:
        ValueError: the mask has several channels or contains invalid class numbers.
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
