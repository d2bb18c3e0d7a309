"""Read regression data: CSV files with the paths of images in the first column and values to predict in the others.

The first line of each file names the columns. The paths are relative to the folder of the CSV file. The data is either
one CSV file, or a folder with ``train.csv`` and optionally ``val.csv`` and ``test.csv``. ``efft_lab.data.folder.PARTS``
lists other names that these three files may have. If ``val.csv`` or ``test.csv`` is missing, its images are taken from
the training images, as described in :mod:`efft_lab.data.folder`.
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from efft_lab.data.folder import PARTS, describe, roles
from efft_lab.data.pictures import is_hidden
from efft_lab.data.task import FileImages, Splits, TaskInfo


class ValuedImages(FileImages):
    """Image files, each with one or more numbers.

    Args:
        paths: one file per image.
        values: the values to predict, [n, values].
    """

    def __init__(self, paths: Sequence[Path], values: npt.NDArray[np.float64]) -> None:
        super().__init__(paths, [0] * len(paths))
        self.values = values

    def joined(self, other: FileImages) -> "ValuedImages":
        assert isinstance(other, ValuedImages)
        return ValuedImages([*self.paths, *other.paths], np.concatenate([self.values, other.values]))

    def target(self, index: int, image_size: int) -> torch.Tensor:
        """Return the values of an image, float32 [values]."""
        return torch.from_numpy(self.values[index]).float()


def read(path: Path, seed: int) -> tuple[TaskInfo, Splits]:
    """Read the splits of a CSV file or of a folder of CSV files.

    Raises:
        ValueError: the files do not exist, they have different columns, a line has invalid numbers, or images cannot be
            read. The message describes the content that was found.
    """
    tables = {"train": path} if path.is_file() else _tables(path)
    read = {part: _read(file) for part, file in tables.items()}
    names = read["train"][0]
    for part, (columns, _) in read.items():
        if columns != names:
            raise ValueError(f"{tables[part]} has the columns {columns}, but {tables['train']} has {names}")
    splits = roles(path, {part: images for part, (_, images) in read.items()}, ["of all"], seed)
    return describe(path, "regression", names), splits


def _tables(folder: Path) -> dict[str, Path]:
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() == ".csv" and not is_hidden(p.name))
    found = {part: [file for file in files if file.stem.lower() in known] for part, known in PARTS.items()}
    tables = {part: several[0] for part, several in found.items() if len(several) == 1}
    if not any(found.values()) and len(files) == 1:
        return {"train": files[0]}
    if "train" not in tables or any(len(several) > 1 for several in found.values()):
        here = ", ".join(file.name for file in files) or "none"
        raise ValueError(
            f"expected train.csv and perhaps val.csv and test.csv in {folder}, or a single CSV file; found {here}"
        )
    return tables


def _read(file: Path) -> tuple[list[str], ValuedImages]:
    with open(file, newline="", encoding="utf-8-sig") as lines:
        rows = [(number, row) for number, row in enumerate(csv.reader(lines), 1) if any(map(str.strip, row))]
    if len(rows) < 2 or len(rows[0][1]) < 2:
        raise ValueError(
            f"{file} has {len(rows)} lines and {len(rows[0][1]) if rows else 0} columns: expected a line that names "
            "the columns, separated by commas, and a line for each image with its file and at least one value"
        )
    header = rows[0][1]
    if any(_number(cell) is not None for cell in header[1:]):
        raise ValueError(f"{file} begins with {header}: expected a line that names the columns, such as file,age")
    paths, values = [], []
    for number, row in rows[1:]:
        numbers = [_number(cell) for cell in row[1:]]
        if len(row) != len(header) or None in numbers:
            raise ValueError(f"{file}, line {number}: expected a file and {len(header) - 1} finite numbers, got {row}")
        paths.append(file.parent / row[0].strip())
        values.append(numbers)
    return [name.strip() for name in header[1:]], ValuedImages(paths, np.array(values, np.float64))


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
