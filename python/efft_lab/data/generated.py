"""Draw the tasks ``count``, ``x-location`` and ``orientation`` with NumPy, without a renderer.

The factors of an image (such as the positions, sizes and colors of its objects) are random numbers, and one of them
determines the label. All other factors are independent of the label. The tasks need no download and no license, and
their labels are exact.

The tasks replace three tasks of VTAB's structured group (CLEVR-count, and dSprites location and orientation). They do
not imitate the pixels of the original sets, and accuracies must not be compared with those on the original sets.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from efft_lab.data.fetch import notify
from efft_lab.data.splits import balanced_labels, stable_rng
from efft_lab.data.store import Prepared, load_or_build, vtab_style_splits
from efft_lab.data.task import Splits, TaskInfo

Floats = npt.NDArray[np.float64]

FOLDER = "generated"
SIZE = 64  # pixels, height and width
POOL, TEST = 3_000, 2_000
BINS = 16  # number of classes of x-location and orientation
FEWEST, MOST = 3, 10  # minimum and maximum number of objects in an image of the task count
_GAP = 0.03  # minimum gap between two objects in image widths (about two pixels)
_CENTERS = (np.arange(2 * SIZE) + 0.5) / (2 * SIZE)  # positions of the samples along one axis (two samples per pixel)
_ALL = slice(None)
_FORMAT = 1  # part of the cached file's name; it must be increased when the images change

# The coordinate v of the heart's center of mass in the formula of the heart. Sprites are positioned by their center of
# mass.
_HEART_CENTER = 0.2581

INFOS = {
    info.name: info
    for info in (
        TaskInfo(
            "count",
            "structured",
            MOST - FEWEST + 1,
            "generated: 3 to 10 shaded objects, 64 x 64",
            "none needed",
            tuple(str(number) for number in range(FEWEST, MOST + 1)),
            baselines={"majority": 12.5, "ink": 17.9, "pixels": 13.1},
        ),
        TaskInfo(
            "x-location",
            "structured",
            BINS,
            "generated: horizontal position of one white shape, 64 x 64",
            "none needed",
            baselines={"majority": 6.2, "ink": 6.7, "pixels": 58.0},
        ),
        TaskInfo(
            "orientation",
            "structured",
            BINS,
            "generated: angle of one white heart, 64 x 64",
            "none needed",
            baselines={"majority": 6.2, "ink": 5.5, "pixels": 8.6},
        ),
    )
}


def read(name: str, root: Path, seed: int) -> tuple[TaskInfo, Splits]:
    """Read the splits of a generated task. Draw its images first if ``root`` does not contain them."""
    prepared = load_or_build(path(name, root), lambda: build(name))
    return INFOS[name], vtab_style_splits(prepared, seed)


def path(name: str, root: Path) -> Path:
    """Return the path of the file for a generated task. The file name contains the version of this module's format."""
    return root / f"{name}-v{_FORMAT}.npz"


def build(name: str) -> Prepared:
    """Draw the training pool and the test set of a task with two fixed seeds."""
    notify(f"drawing {POOL + TEST} images of {name}")
    return Prepared(*generate(name, POOL, seed=1), *generate(name, TEST, seed=0))


def generate(name: str, n: int, seed: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Draw n images of a task with equally frequent classes.

    Return the images, uint8 [n, 64, 64, 3] for ``count`` and [n, 64, 64] for the other tasks, and the labels [n].
    """
    rng = stable_rng(list(INFOS).index(name), seed)
    if name == "count":
        scenes = count_factors(n, rng)
        return np.stack([_draw_scene(scenes, index) for index in range(n)]), scenes.label
    sprites = sprite_factors(name, n, rng)
    return _draw_sprites(sprites), sprites.label


def _square(u: Floats, v: Floats) -> Any:
    return np.maximum(abs(u), abs(v)) < 0.7


def _ellipse(u: Floats, v: Floats) -> Any:
    return u * u + (v / 0.6) ** 2 < 1


def _triangle(u: Floats, v: Floats) -> Any:
    return (v > -0.5) & (v < 1 - np.sqrt(3) * abs(u))


def _heart(u: Floats, v: Floats) -> Any:
    v = v + _HEART_CENTER
    return (u * u + v * v - 0.5) ** 3 < 1.2 * u * u * v * v * v


# A shape returns whether each point (u, v) is inside of it. Shapes are about as large as the unit circle.
Shape = Callable[[Floats, Floats], Any]
SPRITES: tuple[Shape, ...] = (_square, _ellipse, _heart)
OBJECTS: tuple[Shape, ...] = (_square, _ellipse, _triangle)  # these shapes are inside of the unit circle


@dataclass(frozen=True)
class SpriteFactors:
    """The factors of n images of x-location or orientation, which show one sprite each.

    Lengths are in image widths, and all arrays are [n].
    """

    label: npt.NDArray[np.int64]
    shape: npt.NDArray[np.int64]  # index into SPRITES
    x: Floats
    y: Floats
    radius: Floats
    angle: Floats  # radians, clockwise on the screen


def sprite_factors(name: str, n: int, rng: np.random.RandomState) -> SpriteFactors:
    """Draw the factors of n images of the task x-location or orientation."""
    label = balanced_labels(n, BINS, rng)
    within_bin = (label + rng.random_sample(n)) / BINS
    free = rng.random_sample(n)
    place, turn = (within_bin, free) if name == "x-location" else (free, within_bin)
    return SpriteFactors(
        label,
        # A square or an ellipse looks the same at several angles. Images of orientation therefore show only the heart.
        rng.randint(len(SPRITES), size=n) if name == "x-location" else np.full(n, SPRITES.index(_heart)),
        x=0.2 + 0.6 * place,
        y=rng.uniform(0.2, 0.8, n),
        radius=rng.uniform(0.08, 0.16, n),
        angle=2 * np.pi * turn,
    )


def _draw_sprites(factors: SpriteFactors) -> npt.NDArray[np.uint8]:
    images = np.empty((len(factors.label), SIZE, SIZE), np.uint8)
    for index, shape in enumerate(factors.shape.tolist()):
        x, y, radius, angle = (float(values[index]) for values in (factors.x, factors.y, factors.radius, factors.angle))
        u, v = _local(x, y, radius, angle)
        images[index] = np.rint(_downsample(SPRITES[shape](u, v).astype(float)) * 255)
    return images


@dataclass(frozen=True)
class CountFactors:
    """The factors of n images of the task count. Lengths are in image widths.

    Arrays [n, MOST, ...] have one entry per object. In each image, only the entries of the first ``label + FEWEST``
    objects are used.
    """

    label: npt.NDArray[np.int64]  # [n], number of objects minus FEWEST
    scale: Floats  # [n], common factor of the radii in an image
    radius: Floats  # [n, MOST]
    position: Floats  # [n, MOST, 2]
    angle: Floats  # [n, MOST]
    shape: npt.NDArray[np.int64]  # [n, MOST], index into OBJECTS
    color: Floats  # [n, MOST, 3]
    ground: Floats  # [n, 3]
    slope: Floats  # [n, 2], change of the background's brightness from left to right and from top to bottom


def count_factors(n: int, rng: np.random.RandomState) -> CountFactors:
    """Draw the factors of n images of the task count.

    All objects in an image share one random scale. Their total area therefore does not reveal their number.
    """
    label = balanced_labels(n, MOST - FEWEST + 1, rng)
    scale = np.exp(rng.uniform(np.log(0.55), np.log(1.3), n))
    radius = scale[:, None] * rng.uniform(0.06, 0.08, (n, MOST))
    return CountFactors(
        label,
        scale,
        radius,
        position=_place(radius, label + FEWEST, rng),
        angle=rng.uniform(0, 2 * np.pi, (n, MOST)),
        shape=rng.randint(len(OBJECTS), size=(n, MOST)),
        color=_colors(n * MOST, rng).reshape(n, MOST, 3),
        ground=rng.uniform(0.4, 0.6, (n, 3)),
        slope=rng.uniform(-0.1, 0.1, (n, 2)),
    )


def _colors(n: int, rng: np.random.RandomState) -> Floats:
    """Draw saturated colors [n, 3].

    One channel is high, and one is so low that the color contrasts with any background.
    """
    colors = rng.uniform(0, 1, (n, 3))
    order = np.argsort(rng.random_sample((n, 3)), axis=1)
    rows = np.arange(n)
    colors[rows, order[:, 0]] = rng.uniform(0.8, 1, n)
    colors[rows, order[:, 1]] = rng.uniform(0, 0.15, n)
    return colors


def _place(radius: Floats, objects: npt.NDArray[np.int64], rng: np.random.RandomState) -> Floats:
    """Draw positions [n, MOST, 2] of objects that do not touch each other, for all images at once.

    If 300 attempts do not suffice for an image, all its objects are placed again, with the same number and sizes. The
    number and the sizes of the objects therefore do not depend on the placement.
    """
    position = np.zeros((*radius.shape, 2))
    placed = np.zeros(len(radius), np.int64)
    tries = np.zeros(len(radius), np.int64)
    while (unfinished := np.flatnonzero(placed < objects)).size:
        current = placed[unfinished]
        own = radius[unfinished, current]
        margin = (own + 0.01)[:, None]
        candidate = margin + (1 - 2 * margin) * rng.random_sample((len(unfinished), 2))
        distance = ((position[unfinished] - candidate[:, None]) ** 2).sum(2)
        clash = distance < (radius[unfinished] + own[:, None] + _GAP) ** 2
        free = ~(clash & (np.arange(MOST) < current[:, None])).any(1)
        position[unfinished[free], current[free]] = candidate[free]
        placed[unfinished[free]] += 1
        tries[unfinished] += 1
        stuck = unfinished[tries[unfinished] >= 300]
        placed[stuck] = tries[stuck] = 0
    return position


def _draw_scene(factors: CountFactors, index: int) -> npt.NDArray[np.uint8]:
    """Draw one image of the task count, uint8 [64, 64, 3]."""
    slope_x, slope_y = factors.slope[index]
    shade = slope_x * (_CENTERS - 0.5)[None, :] + slope_y * (_CENTERS - 0.5)[:, None]
    canvas = factors.ground[index] + shade[:, :, None]
    for k in range(int(factors.label[index]) + FEWEST):
        (x, y), radius = factors.position[index, k], float(factors.radius[index, k])
        columns, rows = (
            slice(int((center - radius) * len(_CENTERS)), int((center + radius) * len(_CENTERS)) + 1)
            for center in (x, y)
        )
        u, v = _local(x, y, radius, float(factors.angle[index, k]), columns, rows)
        inside = OBJECTS[factors.shape[index, k]](u, v)
        light = 1 - 0.35 * (_CENTERS[columns] - x + radius) / (2 * radius)  # light comes from the left
        paint = factors.color[index, k] * light[None, :, None]
        canvas[rows, columns] = np.where(inside[:, :, None], paint, canvas[rows, columns])
    return np.rint(_downsample(canvas) * 255).astype(np.uint8)


def _local(
    x: float, y: float, radius: float, angle: float, columns: slice = _ALL, rows: slice = _ALL
) -> tuple[Floats, Floats]:
    """Return the coordinates (u, v) of the samples in the coordinate system of a shape, each [rows, columns]."""
    right, down = (_CENTERS[columns] - x)[None, :] / radius, (_CENTERS[rows] - y)[:, None] / radius
    cos, sin = np.cos(angle), np.sin(angle)
    return right * cos + down * sin, down * cos - right * sin


def _downsample(samples: Floats) -> Floats:
    """Average the 2 x 2 samples of every pixel: [128, 128, ...] to [64, 64, ...]."""
    lines = samples[0::2] + samples[1::2]
    return (lines[:, 0::2] + lines[:, 1::2]) / 4
