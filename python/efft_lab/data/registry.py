"""Find all known tasks by name, and load, download and list them.

Each task is provided by a source, which is one of the modules ``packaged``, ``generated``, ``rendered``,
``torchvision_sets`` and ``vtab``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from efft.hints import nearest
from efft_lab.data import folder, generated, masks, packaged, rendered, table, torchvision_sets, vtab
from efft_lab.data.fetch import cache_dir
from efft_lab.data.splits import stratified_split
from efft_lab.data.task import Kind, Normalization, Preprocess, Split, Splits, TaskData, TaskInfo


class _Source(Protocol):
    """The interface of a source, a module that provides tasks."""

    @property
    def INFOS(self) -> dict[str, TaskInfo]: ...
    @property
    def FOLDER(self) -> str: ...  # name of the source's folder in the cache folder
    def path(self, name: str, root: Path) -> Path: ...  # a path that exists if the task is ready to read
    def read(self, name: str, root: Path, seed: int) -> tuple[TaskInfo, Splits]: ...


_READERS: dict[Kind, Callable[[Path, int], tuple[TaskInfo, Splits]]] = {
    "classification": folder.read,
    "segmentation": masks.read,
    "regression": table.read,
}
_SOURCES: tuple[_Source, ...] = (packaged, generated, rendered, torchvision_sets, vtab)


def names() -> list[str]:
    """Return the names of all known tasks. A folder of your own is not listed, because it is loaded by its path."""
    return [name for source in _SOURCES for name in source.INFOS]


def describe(name: str) -> TaskInfo:
    """Return the description of a task without reading or downloading data.

    Raises:
        ValueError: The task is unknown. The message lists similar names.
    """
    return _source(name).INFOS[name]


def load(
    name_or_path: str | Path,
    root: str | Path | None = None,
    image_size: int = 224,
    normalization: Normalization = "imagenet",
    seed: int = 0,
    allow_non_commercial: bool = False,
    max_test: int | None = None,
    kind: Kind = "classification",
) -> TaskData:
    """Load a task. If it is not available yet, it is downloaded or drawn first, if this is possible.

    Published results were computed with different normalizations and must not be mixed. The public code of EFFT, FacT
    and NOAH uses ``"imagenet"`` (mean and standard deviation of ImageNet). VPT and SSF use ``"none"`` (values in 0..1),
    according to the authors of FacT. timm specifies ``"half"`` (0.5 for both) for the ImageNet-21k weights of ViT.

    Args:
        name_or_path: A name from :func:`names`, or a path of your own data (see :mod:`efft_lab.data.folder`,
            :mod:`efft_lab.data.masks` and :mod:`efft_lab.data.table`). A name has priority over a path. If a folder has
            the name of a task, such as count, write ``./count``.
        root: Folder of the VTAB-1K tasks, the torchvision data or the prepared sets. By default, it is a folder in the
            cache (``$EFFT_HOME`` or ``~/.cache/efft``).
        image_size: Height and width of the images, in pixels.
        normalization: ``"imagenet"``, ``"half"``, ``"none"`` or ``(mean, std)`` of three numbers each.
        seed: Seed that selects training and validation images: 800 and 200 from the pool of a packaged, generated,
            rendered or torchvision set, or the validation images of your own data, if they are not given. The seed
            never changes a test set or the splits of VTAB-1K.
        allow_non_commercial: Whether to accept a license that forbids commercial use.
        max_test: Maximum number of test images. The same images are always selected, in proportion to the class sizes
            of the test set.
        kind: Kind of task of your own data: ``"classification"`` (one folder per class), ``"segmentation"`` (images and
            masks) or ``"regression"`` (a CSV file of images and values).

    Raises:
        ValueError: The name or path does not exist, the content of the folder is invalid, or another argument is
            invalid. The message lists similar names or describes the content.
        PermissionError: The license forbids commercial use, and ``allow_non_commercial`` is False.
        FileNotFoundError: Files of a VTAB-1K task are missing.
        RuntimeError: A download failed, or a prepared set in the cache is damaged.
        ConnectionError: torchvision could not download a set.
        ImportError: A package that is needed to read or draw the images is not installed.
    """
    preprocess = Preprocess(image_size, normalization)
    name = str(name_or_path)
    if name in names():
        source = _source(name)
        if source.INFOS[name].kind != kind:
            raise ValueError(
                f"{name!r} is a task of {source.INFOS[name].kind}, not of {kind}: give a folder of your own"
            )
        _check_license(source.INFOS[name], allow_non_commercial)
        info, splits = source.read(name, _root(source, root), seed)
    elif Path(name).is_dir() or (kind == "regression" and Path(name).is_file()):
        info, splits = _READERS[kind](Path(name), seed)
    else:
        raise ValueError(f"{_unknown(name)}, nor is there a folder of that name")
    if max_test is not None:
        splits["test"] = _limit(splits["test"], max_test)
    return TaskData(info, splits, preprocess)


def fetch(name: str, root: str | Path | None = None, allow_non_commercial: bool = False) -> Path:
    """Prepare a task for loading without a network, and return its file or folder.

    Args:
        name: A name from :func:`names`.
        root: Folder of the prepared data, as for :func:`load`.
        allow_non_commercial: Whether to accept a license that forbids commercial use.

    Raises:
        The same errors as :func:`load`. VTAB-1K cannot be downloaded. If its files are missing, the error message
        explains how to get them.
    """
    source = _source(name)
    _check_license(source.INFOS[name], allow_non_commercial)
    source.read(name, _root(source, root), seed=0)
    return source.path(name, _root(source, root))


def list_table() -> str:
    """Return a text table of all tasks.

    The column ``trivial`` contains the best test accuracy, in percent, of predictors that do not recognize objects (see
    :func:`efft_lab.data.trivial_baselines`). The column ``ready`` tells whether the task is in the cache.
    """
    rows = [("name", "group", "classes", "trivial", "download", "ready", "license", "source")]
    for source in _SOURCES:
        for info in source.INFOS.values():
            size = f"{info.download_bytes / 1e6:.1f} MB" if info.download_bytes else "-"
            trivial = f"{max(info.baselines.values()):.1f}" if info.baselines else "-"
            ready = "yes" if source.path(info.name, _root(source, None)).exists() else "no"
            facts = (info.name, str(info.group), str(info.classes), trivial, size, ready, info.license, info.source)
            rows.append(facts)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _source(name: str) -> _Source:
    for source in _SOURCES:
        if name in source.INFOS:
            return source
    raise ValueError(_unknown(name))


def _unknown(name: str) -> str:
    near = nearest(name, names(), 4)
    near += [known for known in names() if name.lower() in known and known not in near]
    hint = f"similar names: {', '.join(near)}" if near else f"known names: {', '.join(names())}"
    return f"{name!r} is not a known task ({hint})"


def _root(source: _Source, root: str | Path | None) -> Path:
    return cache_dir() / "data" / source.FOLDER if root is None else Path(root).expanduser()


def _check_license(info: TaskInfo, allowed: bool) -> None:
    if info.non_commercial and not allowed:
        raise PermissionError(
            f"the license of {info.name} ({info.license}) forbids commercial use. If yours is not commercial, pass "
            "allow_non_commercial=True (command line: --allow-non-commercial)"
        )


def _limit(test: Split, size: int) -> Split:
    if size < 1:
        raise ValueError(f"max_test must be at least 1, got {size}")
    if size >= len(test.indices):
        return test
    (chosen,) = stratified_split(test.images.labels[test.indices], [size], seed=0)
    return Split(test.images, test.indices[chosen])
