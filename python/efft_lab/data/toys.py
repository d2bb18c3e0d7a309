"""Draw images that resemble small NORB: gray toys of five kinds, at 18 rotations (azimuths) and 9 camera elevations.

As in VTAB's tasks with small NORB, the class of ``norb-azimuth`` is the rotation of the toy about its vertical axis,
and the class of ``norb-elevation`` is the elevation of the camera. The test set and the training pool contain different
toys. The toy, the light, the distance of the camera and the other angle are independent of the label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from efft_lab.data import raytracing
from efft_lab.data.raytracing import Camera, Light, Shape

AZIMUTHS = 18  # number of azimuths, in steps of 20 degrees
ELEVATIONS = tuple(range(30, 71, 5))  # degrees above the ground
TOYS = 10  # number of toys of each kind, both in the training pool and in the test set


@dataclass(frozen=True)
class Part:
    """A solid part of a toy, in the toy's own coordinates (x to the front, z up).

    Args:
        kind: ``box``, ``rod`` or ``ball``.
        a: Center of a box or ball, or one end of a rod.
        b: Half edge lengths of a box, or the other end of a rod. Not used for a ball.
        size: Radius of a rod or ball. Not used for a box.
        shade: Index into the toy's three gray values.
    """

    kind: str
    a: tuple[float, float, float]
    b: tuple[float, float, float]
    size: float
    shade: int


Toy = tuple[list[Part], Sequence[float]]  # parts, and the three gray values


def _box(x: float, y: float, z: float, half_x: float, half_y: float, half_z: float, shade: int) -> Part:
    return Part("box", (x, y, z), (half_x, half_y, half_z), 0.0, shade)


def _rod(start: tuple[float, float, float], end: tuple[float, float, float], radius: float, shade: int) -> Part:
    return Part("rod", start, end, radius, shade)


def _ball(x: float, y: float, z: float, radius: float, shade: int) -> Part:
    return Part("ball", (x, y, z), (0.0, 0.0, 0.0), radius, shade)


def _animal(rng: np.random.RandomState) -> list[Part]:
    length, width, legs = rng.uniform(0.5, 0.75), rng.uniform(0.16, 0.26), rng.uniform(0.3, 0.6)
    depth, neck, head = rng.uniform(0.17, 0.26), rng.uniform(0.1, 0.55), rng.uniform(0.15, 0.22)
    top = legs + 2 * depth
    parts = [_box(0, 0, legs + depth, length, width, depth, 0)]
    for x in (-0.8 * length, 0.8 * length):
        for y in (-0.7 * width, 0.7 * width):
            parts.append(_rod((x, y, 0), (x, y, legs + 0.05), 0.07, 1))
    front, height = length + 0.5 * neck, top - 0.1 + neck
    parts.append(_rod((length - 0.1, 0, top - 0.15), (front, 0, height), 0.1, 0))
    parts.append(_ball(front, 0, height, head, 2))
    parts.append(_box(front + head + 0.05, 0, height - 0.04, 0.14, 0.08, 0.07, 2))
    tail = rng.uniform(0.25, 0.5)
    parts.append(_rod((-length, 0, top - 0.08), (-length - tail, 0, top - rng.uniform(0, 0.5)), 0.05, 1))
    return parts


def _human(rng: np.random.RandomState) -> list[Part]:
    legs, torso, width = rng.uniform(0.6, 0.8), rng.uniform(0.28, 0.38), rng.uniform(0.22, 0.32)
    parts = [_box(0, 0, legs + torso, 0.15, width, torso, 0)]
    stride = rng.uniform(0.1, 0.3)
    for y, step in ((-0.55 * width, stride), (0.55 * width, -stride)):
        parts.append(_rod((step, y, 0.05), (0, y, legs + 0.05), 0.1, 1))
        parts.append(_box(step + 0.12, y, 0.06, 0.2, 0.09, 0.06, 2))
    shoulder = legs + 2 * torso - 0.1
    lift = rng.uniform(0.3, 0.6)
    parts.append(_rod((0, width + 0.07, shoulder), (lift, width + 0.12, shoulder - rng.uniform(-0.2, 0.3)), 0.08, 0))
    parts.append(_rod((0, -width - 0.07, shoulder), (0.1, -width - 0.15, shoulder - 0.6), 0.08, 0))
    head = rng.uniform(0.16, 0.22)
    parts.append(_ball(0.03, 0, legs + 2 * torso + head, head, 2))
    if rng.random_sample() < 0.5:  # a backpack
        parts.append(_box(-0.27, 0, legs + torso * 1.1, 0.13, 0.8 * width, 0.7 * torso, 1))
    return parts


def _plane(rng: np.random.RandomState) -> list[Part]:
    length, radius, span = rng.uniform(0.8, 1.05), rng.uniform(0.12, 0.2), rng.uniform(0.7, 1.05)
    z = rng.uniform(0.3, 0.5)
    wing = rng.uniform(-0.1, 0.25)
    parts = [_rod((-length, 0, z), (length - radius, 0, z), radius, 0), _ball(length - radius, 0, z, radius, 2)]
    parts.append(_box(wing, 0, z + rng.uniform(-0.05, 0.1), rng.uniform(0.15, 0.25), span, 0.035, 1))
    parts.append(_box(-length + 0.12, 0, z + radius + 0.2, 0.12, 0.03, 0.24, 2))
    parts.append(_box(-length + 0.12, 0, z + 0.06, 0.12, 0.4 * span, 0.03, 1))
    if rng.random_sample() < 0.5:  # engines below the wing
        for y in (-0.45 * span, 0.45 * span):
            parts.append(_rod((wing - 0.1, y, z - 0.1), (wing + 0.3, y, z - 0.1), 0.08, 2))
    return parts


def _wheels(places: Sequence[float], width: float, radius: float) -> list[Part]:
    return [
        _rod((x, side * width - 0.06, radius), (x, side * width + 0.06, radius), radius, 2)
        for x in places
        for side in (-1, 1)
    ]


def _truck(rng: np.random.RandomState) -> list[Part]:
    length, width, height = rng.uniform(0.8, 1.05), rng.uniform(0.28, 0.38), rng.uniform(0.25, 0.42)
    wheel, cab, floor = rng.uniform(0.13, 0.18), rng.uniform(0.17, 0.26), 0.25
    cab_height = rng.uniform(0.22, 0.34)
    parts = [
        _box(-cab - 0.04, 0, floor + height, length - cab - 0.04, width, height, 0),
        _box(length - cab, 0, floor + cab_height, cab, 0.92 * width, cab_height, 1),
        _box(0, 0, floor - 0.04, length, 0.7 * width, 0.05, 2),
    ]
    if rng.random_sample() < 0.5:  # a hood
        parts.append(_box(length + 0.14, 0, floor + 0.13, 0.16, 0.8 * width, 0.14, 1))
    return parts + _wheels((-0.75 * length, -0.35 * length, 0.75 * length), width, wheel)


def _car(rng: np.random.RandomState) -> list[Part]:
    length, width, height = rng.uniform(0.75, 0.95), rng.uniform(0.32, 0.42), rng.uniform(0.13, 0.19)
    wheel, cabin, back = rng.uniform(0.14, 0.19), rng.uniform(0.3, 0.42), rng.uniform(0.1, 0.3)
    roof = rng.uniform(0.13, 0.2)
    parts = [
        _box(0, 0, 0.14 + height, length, width, height, 0),
        _box(-back, 0, 0.14 + 2 * height + roof, cabin, 0.85 * width, roof, 1),
        # The windshield is in front of the cabin and has another gray value.
        _box(cabin - back + 0.06, 0, 0.14 + 2 * height + 0.6 * roof, 0.08, 0.8 * width, 0.6 * roof, 2),
    ]
    if rng.random_sample() < 0.4:  # a spoiler
        parts.append(_box(-length + 0.1, 0, 0.14 + 2 * height + 0.12, 0.09, width, 0.03, 2))
    return parts + _wheels((-0.62 * length, 0.62 * length), width, wheel)


KINDS: tuple[Callable[[np.random.RandomState], list[Part]], ...] = (_animal, _human, _plane, _truck, _car)


@dataclass(frozen=True)
class View:
    """The factors of one image."""

    label: int
    toy: int  # index of the toy
    azimuth: int  # number of steps of 20 degrees
    elevation: int  # index into ELEVATIONS
    camera: Camera
    light: Light
    fill: Light  # a weaker lamp at the position of the camera


def make_toys(rng: np.random.RandomState) -> list[Toy]:
    """Draw ten toys of each kind, with random proportions and gray values."""
    return [(kind(rng), rng.uniform(0.1, 0.85, 3).tolist()) for kind in KINDS for _ in range(TOYS)]


def draw(name: str, label: int, toys: int, rng: np.random.RandomState) -> View:
    """Draw the factors of one image of norb-azimuth or norb-elevation. ``toys`` is the number of toys."""
    azimuth = label if name == "norb-azimuth" else rng.randint(AZIMUTHS)
    elevation = label if name == "norb-elevation" else rng.randint(len(ELEVATIONS))
    height = np.radians(ELEVATIONS[elevation])
    distance = rng.uniform(4.4, 5.4)
    target = np.array([rng.uniform(-0.12, 0.12), rng.uniform(-0.12, 0.12), 0.45])
    origin = target + distance * np.array([0.0, -np.cos(height), np.sin(height)])
    side, rise = rng.uniform(0, 2 * np.pi), np.radians(rng.uniform(35, 75))
    lamp = 6 * np.array([np.cos(rise) * np.cos(side), np.cos(rise) * np.sin(side), np.sin(rise)])
    return View(
        label,
        rng.randint(toys),
        azimuth,
        elevation,
        Camera(origin, target),
        Light(lamp.tolist(), rng.uniform(40, 80)),
        Light(origin.tolist(), rng.uniform(8, 16)),
    )


def paint(view: View, toy: Toy, seed: int) -> npt.NDArray[np.uint8]:
    """Render one image, uint8 [64, 64]."""
    angle = 2 * np.pi * view.azimuth / AZIMUTHS
    cos, sin = np.cos(angle), np.sin(angle)

    def turned(point: tuple[float, float, float]) -> tuple[float, float, float]:
        x, y, z = point
        return float(cos * x - sin * y), float(sin * x + cos * y), z

    parts, grays = toy
    shapes: list[Shape] = []
    for part in parts:
        material = raytracing.matte((grays[part.shade],) * 3)
        if part.kind == "box":
            shapes += raytracing.box(turned(part.a), part.b, material, float(angle))
        elif part.kind == "rod":
            shapes += raytracing.cylinder(turned(part.a), turned(part.b), part.size, material)
        else:
            shapes += raytracing.sphere(turned(part.a), part.size, material)
    return raytracing.render(shapes, view.camera, [view.light, view.fill], seed)[:, :, 1]
