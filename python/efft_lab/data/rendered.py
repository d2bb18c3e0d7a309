"""Draw tasks with renderers: ray-traced scenes, views of a 3-D world, and letters in many fonts.

The tasks resemble tasks of VTAB (from CLEVR, small NORB, DMLab and SVHN). They do not imitate the pixels of the
original sets, and accuracies must not be compared with those on the original sets.

A set is drawn once, which takes minutes, and is stored in the cache. :data:`RECORDED` contains the hashes of the sets
with which the results in this repository were computed. On another processor or with another release of a renderer,
rounding errors, and therefore hashes, may differ. Such a set is still used, and a message on stderr reports the
difference.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from efft_lab.data import first_person, letters, tabletop, toys
from efft_lab.data.fetch import notify
from efft_lab.data.splits import balanced_labels, stable_rng
from efft_lab.data.store import Prepared, load_or_build, vtab_style_splits
from efft_lab.data.task import Splits, TaskInfo

FOLDER = "rendered"
POOL, TEST = 2_000, 1_000
_FORMAT = 1  # part of the cached file's name; it must be increased when the images change

Drawn = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]  # images and labels


@dataclass(frozen=True)
class Rendering:
    """One rendered set.

    Args:
        info: Description of the set.
        draw: Function with the arguments n and test. It draws n images of the training pool (if test is False) or of
            the test set, and returns the images and their labels. Equal arguments give equal images.
    """

    info: TaskInfo
    draw: Callable[[int, bool], Drawn]


def read(name: str, root: Path, seed: int) -> tuple[TaskInfo, Splits]:
    """Read the splits of a rendered task. Draw its images first if ``root`` does not contain them."""
    prepared = load_or_build(path(name, root), lambda: build(name))
    digest, recorded = fingerprint(prepared), RECORDED.get(name)
    info = INFOS[name]
    if digest != recorded:
        notify(
            f"the images of {name} differ from those of the recorded results: sha256 {digest[:12]}, recorded "
            f"{(recorded or 'none')[:12]}. Accuracies may differ slightly. The reason may be another processor or "
            "another release of the renderer, which round differently"
        )
        info = dataclasses.replace(info, source=f"{info.source} (another rendering: sha256 {digest[:12]})")
    return info, vtab_style_splits(prepared, seed)


def path(name: str, root: Path) -> Path:
    """Return the path of the file for a rendered task. The file name contains the version of this module's format."""
    return root / f"{name}-v{_FORMAT}.npz"


def build(name: str) -> Prepared:
    """Draw the training pool and the test set of a task."""
    notify(f"drawing {POOL + TEST} images of {name}: this takes minutes, once")
    draw = RENDERINGS[name].draw
    return Prepared(*draw(POOL, False), *draw(TEST, True))


def fingerprint(prepared: Prepared) -> str:
    """Return the SHA-256 hash of the shapes, pixels and labels of a set, in hexadecimal digits."""
    digest = hashlib.sha256()
    for images, labels in (prepared[:2], prepared[2:]):
        digest.update(str(images.shape).encode())
        digest.update(np.ascontiguousarray(images).tobytes())
        digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()


def _tabletop(name: str, classes: int, key: int) -> Callable[[int, bool], Drawn]:
    def draw(n: int, test: bool) -> Drawn:
        rng = stable_rng(key, int(test))
        labels = balanced_labels(n, classes, rng)
        scenes = [tabletop.draw(name, int(label), rng) for label in labels]
        first = n * int(test)
        return np.stack([tabletop.paint(scene, first + k) for k, scene in enumerate(scenes)]), labels

    return draw


def _toys(name: str, classes: int, key: int) -> Callable[[int, bool], Drawn]:
    def draw(n: int, test: bool) -> Drawn:
        rng = stable_rng(key, int(test))
        instances = toys.make_toys(rng)
        labels = balanced_labels(n, classes, rng)
        views = [toys.draw(name, int(label), len(instances), rng) for label in labels]
        first = n * int(test)
        images = [toys.paint(view, instances[view.toy], first + k) for k, view in enumerate(views)]
        return np.stack(images), labels

    return draw


def _views(n: int, test: bool) -> Drawn:
    return first_person.draw(n, test, stable_rng(15, int(test)))


def _letters(n: int, test: bool) -> Drawn:
    rng = stable_rng(16, int(test))
    labels = balanced_labels(n, len(letters.LETTERS), rng)
    return letters.draw(n, labels, letters.load_faces(letters.TEST if test else letters.TRAIN), rng), labels


_TABLE = "drawn by mitsuba: solids on a ground, 64 x 64"
_TOYS = "drawn by mitsuba: gray toys (different ones in the test set), 64 x 64"
_NO_LICENSE = "none needed"
_COUNTS = tuple(str(number) for number in range(tabletop.FEWEST, tabletop.MOST + 1))
_DISTANCES = tuple(
    f"{low:g} to {low + tabletop.STEP:g}" for low in tabletop.NEAR + tabletop.STEP * np.arange(tabletop.BINS)
)
_DEPTHS = tuple(f"{low:g} to {high:g}" for low, high in pairwise(first_person.EDGES))
_AZIMUTHS = tuple(f"{360 // toys.AZIMUTHS * step} degrees" for step in range(toys.AZIMUTHS))
_ELEVATIONS = tuple(f"{elevation} degrees" for elevation in toys.ELEVATIONS)

_ALL = (
    Rendering(
        TaskInfo(
            "clevr-count",
            "structured",
            len(_COUNTS),
            f"{_TABLE}; class: number of solids",
            _NO_LICENSE,
            _COUNTS,
            baselines={"majority": 12.5, "ink": 15.1, "pixels": 21.5},
        ),
        _tabletop("clevr-count", len(_COUNTS), 11),
    ),
    Rendering(
        TaskInfo(
            "clevr-distance",
            "structured",
            len(_DISTANCES),
            f"{_TABLE}; class: distance of the nearest solid",
            _NO_LICENSE,
            _DISTANCES,
            baselines={"majority": 16.7, "ink": 17.2, "pixels": 45.8},
        ),
        _tabletop("clevr-distance", len(_DISTANCES), 12),
    ),
    Rendering(
        TaskInfo(
            "norb-azimuth",
            "structured",
            len(_AZIMUTHS),
            f"{_TOYS}; class: rotation of the toy",
            _NO_LICENSE,
            _AZIMUTHS,
            baselines={"majority": 5.6, "ink": 6.3, "pixels": 19.1},
        ),
        _toys("norb-azimuth", len(_AZIMUTHS), 13),
    ),
    Rendering(
        TaskInfo(
            "norb-elevation",
            "structured",
            len(_ELEVATIONS),
            f"{_TOYS}; class: elevation of the camera",
            _NO_LICENSE,
            _ELEVATIONS,
            baselines={"majority": 11.2, "ink": 19.3, "pixels": 26.3},
        ),
        _toys("norb-elevation", len(_ELEVATIONS), 14),
    ),
    Rendering(
        TaskInfo(
            "doom-distance",
            "structured",
            len(_DEPTHS),
            "drawn by vizdoom: levels of Freedoom (others in the test set), 64 x 64; class: distance of the center",
            "BSD-3-Clause (Freedoom)",
            _DEPTHS,
            baselines={"majority": 16.7, "ink": 16.9, "pixels": 27.0},
        ),
        _views,
    ),
    Rendering(
        TaskInfo(
            "font-letters",
            "natural",
            len(letters.LETTERS),
            "npm @fontsource/* 5.3.0: capital letters in 20 font families (10 other families in the test set), 64 x 64",
            "OFL-1.1 (fonts)",
            tuple(letters.LETTERS),
            sum(archive.size or 0 for archive in letters.TRAIN + letters.TEST),
            baselines={"majority": 3.9, "ink": 4.3, "pixels": 6.8},
        ),
        _letters,
    ),
)
RENDERINGS = {rendering.info.name: rendering for rendering in _ALL}
INFOS = {name: rendering.info for name, rendering in RENDERINGS.items()}

#: SHA-256 of each set (see :func:`fingerprint`), drawn by mitsuba 3.9.1 (drjit 1.5.0), vizdoom 1.3.2 and pillow 13.0.0
#: on an AMD EPYC.
RECORDED: dict[str, str] = {
    "clevr-count": "23161b63cdd388280052432a4a3762a0cd7a77debcc3c8bafde770216470a050",
    "clevr-distance": "c027a0eb035e8cbcbaf761b72c0988e484ff69ba9a2030ac3278a1637f9ece1c",
    "norb-azimuth": "7b790dec19a6e3db4d1d5683c32b37e50bef4ac1c0cd86a7037417abe91b02e4",
    "norb-elevation": "f51382fcf46ec02933c00eafdd36b71c60634286593a0f29621b0295ff03af20",
    "doom-distance": "b95bbf1c1855819d89ae4dea17d628a2f6b3ac587872e130046a44f8f5fac1f7",
    "font-letters": "2ebf9166cbca5de5f127320892512d5157a1c0d27fa63977ace6f7505dec06df",
}
