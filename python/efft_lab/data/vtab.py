"""Read VTAB-1K in its published folder layout, and provide the EFFT paper's settings for each of the 19 tasks.

The folder ``<root>/<task>`` contains four lists of images: ``train800.txt``, ``val200.txt``, ``train800val200.txt`` and
``test.txt``. Each line gives the path of an image below this folder and its label, such as
``images/<split>/000000.jpg 3``. The script ``get_vtab1k.py`` of the NOAH repository writes this layout, and the public
code of NOAH, FacT and EFFT reads it. This module downloads nothing, because several of the original sets need a
registration.
"""

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from efft.hints import did_you_mean, nearest
from efft_lab.data.task import FileImages, Role, Split, Splits, TaskInfo

FOLDER = "vtab-1k"
LISTS: dict[Role, str] = {
    "train": "train800.txt",
    "val": "val200.txt",
    "trainval": "train800val200.txt",
    "test": "test.txt",
}
_HOW = (
    "VTAB-1K is not downloaded: build it with data/vtab-source/get_vtab1k.py of the NOAH repository, "
    "or copy a folder built elsewhere"
)

_TASKS: dict[str, dict[str, Any]] = json.loads((files("efft_lab.data") / "vtab1k.json").read_text("utf-8"))

INFOS = {
    name: TaskInfo(
        name,
        facts["group"],
        facts["classes"],
        "VTAB-1K folder",
        "that of the original set",
    )
    for name, facts in _TASKS.items()
}


def vtab_hyperparameters(task: str, variant: str = "efft2") -> dict[str, Any]:
    """Return the settings for a VTAB-1K task in the public configuration files of the EFFT paper.

    Args:
        task: One of the 19 tasks, e.g. ``"cifar"``.
        variant: ``"efft1"`` or ``"efft2"``.

    Returns:
        ``{"rank": int, "scale": float, "init": str}``, the fields of `efft.EfftConfig`.

    Raises:
        ValueError: The task or variant is unknown.
    """
    if task not in _TASKS:
        hint = did_you_mean(task, _TASKS, 3)
        raise ValueError(f"no published settings for {task!r}: it is not a VTAB-1K task; {hint}")
    if variant not in ("efft1", "efft2"):
        raise ValueError(f"unknown variant {variant!r}; settings are published for efft1 and efft2")
    return dict(_TASKS[task][variant])


def path(name: str, root: Path) -> Path:
    """Return the folder of a task."""
    return root / name


def read(name: str, root: Path, seed: int) -> tuple[TaskInfo, Splits]:
    """Read the splits of a task from its list files. The seed has no effect.

    Raises:
        FileNotFoundError: A folder, a list file or images are missing; the message names them.
        ValueError: A line of a list file is not a path and a label, or the label is out of range.
    """
    folder = path(name, root)
    _check_folders(name, root, folder)
    splits: Splits = {}
    for role, list_name in LISTS.items():
        images = _read_list(folder / list_name, folder, INFOS[name].classes)
        _check_images(images.paths, folder / list_name)
        splits[role] = Split(images, np.arange(len(images.paths)))
    return INFOS[name], splits


def _check_folders(name: str, root: Path, folder: Path) -> None:
    if not root.is_dir():
        raise FileNotFoundError(
            f"no folder {root}: pass root=..., the folder that holds {name}/ and the other tasks. {_HOW}"
        )
    if not folder.is_dir():
        present = sorted(path.name for path in root.iterdir() if path.is_dir())
        near = nearest(name, present)
        hint = f"rename {' or '.join(near)}?" if near else f"it holds: {', '.join(present[:30]) or 'no folders'}."
        raise FileNotFoundError(f"no folder {name}/ in {root}; {hint} {_HOW}")
    missing = [list_name for list_name in LISTS.values() if not (folder / list_name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}. {_HOW}")


def _read_list(file: Path, folder: Path, classes: int) -> FileImages:
    paths, labels = [], []
    try:
        text = file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        image, _, label = line.strip().rpartition(" ")
        if not image or not re.fullmatch("[0-9]{1,9}", label):
            raise ValueError(f"{file}, line {number}: expected 'images/<split>/000000.jpg 3', got {line!r}")
        if int(label) >= classes:
            raise ValueError(f"{file}, line {number}: label {label} is out of range 0..{classes - 1}")
        if "\0" in image or ".." in Path(image).parts or Path(image).is_absolute():
            raise ValueError(f"{file}, line {number}: expected a path below {folder}, got {image!r}")
        paths.append(folder / image.strip())
        labels.append(int(label))
    if not paths:
        raise ValueError(f"{file} lists no images")
    return FileImages(paths, labels)


def _check_images(paths: list[Path], list_file: Path) -> None:
    # Listing each folder once is faster than up to 73,000 calls of exists().
    present = {folder: _names(folder) for folder in {path.parent for path in paths}}
    missing = [path for path in paths if path.name not in present[path.parent]]
    if missing:
        some = ", ".join(str(path) for path in missing[:3])
        raise FileNotFoundError(f"{list_file} lists {len(missing)} images that do not exist: {some}, ...")


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()
