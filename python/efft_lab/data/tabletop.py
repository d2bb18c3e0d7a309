"""Draw scenes that resemble CLEVR: solids of three shapes in several colors and two materials on a ground of tiles.

The class of ``clevr-count`` is the number of objects, and the class of ``clevr-distance`` is the distance from the
camera to the nearest object. All other random factors of a scene, such as the position of the camera, are independent
of the label. (In ``clevr-distance``, only the minimum distance of the other objects depends on the label.) No object
hides another one completely. All objects can therefore be counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from efft_lab.data import raytracing
from efft_lab.data.raytracing import Camera, Floats, Light, Shape

FEWEST, MOST = 3, 10  # minimum and maximum number of objects in clevr-count, as in VTAB's task
NEAR, STEP, BINS = 7.0, 0.5, 6  # clevr-distance: minimum distance, width of a class, and number of classes
_NEAREST, _FAR = 6.5, 12.0  # minimum and maximum distance of an object's center from the camera
_RESTARTS = 1_000  # maximum number of attempts to place all objects of a scene
_BEHIND = 0.15  # clevr-distance: minimum difference in distance between the nearest object and the others
_SIDEWAYS = 0.27  # maximum angle in radians between an object and the direction of view, seen from above
_GAP = 0.12  # minimum gap between two objects on the ground
_APART = 0.85  # minimum distance of two objects in the image, relative to the sum of their radii in the image
_MARGIN = 1.0  # minimum number of pixels between an object and the edge of the image
_TILE = 1.0  # edge length of a tile; tiles make distances visible although the camera's tilt and height vary
_KINDS = 3  # cube, cylinder, sphere

_COLORS = np.array(
    [
        [0.30, 0.30, 0.30],
        [0.68, 0.05, 0.05],
        [0.05, 0.12, 0.68],
        [0.04, 0.40, 0.05],
        [0.25, 0.10, 0.03],
        [0.35, 0.06, 0.55],
        [0.05, 0.55, 0.55],
        [0.85, 0.70, 0.05],
    ]
)


@dataclass(frozen=True)
class Tabletop:
    """The factors of one scene. Arrays without another shape are [objects]."""

    label: int
    camera: Camera
    lights: list[Light]
    radius: Floats
    center: Floats  # [objects, 3]
    kind: npt.NDArray[np.int64]  # 0 for a cube, 1 for a cylinder, 2 for a sphere
    color: npt.NDArray[np.int64]  # index into _COLORS
    tiles: Floats  # [2], the two gray values of the ground
    tiles_turn: float  # rotation of the ground in radians
    glossy: npt.NDArray[np.bool_]
    turn: Floats  # rotation of each object about its vertical axis in radians


def draw(name: str, label: int, rng: np.random.RandomState) -> Tabletop:
    """Draw the factors of one scene of clevr-count or clevr-distance."""
    origin = np.array([rng.uniform(-0.3, 0.3), rng.uniform(-8.2, -7.8), rng.uniform(4.0, 5.0)])
    camera = Camera(origin, np.array([0.0, rng.uniform(-0.4, 0.9), 0.2]))
    objects = label + FEWEST if name == "clevr-count" else rng.randint(2, 8)
    nearest = NEAR + STEP * (label + rng.uniform(0.03, 0.97)) if name == "clevr-distance" else None
    radius = np.exp(rng.uniform(np.log(0.85), np.log(1.2))) * rng.uniform(0.3, 0.46, objects)
    lights = [
        Light((rng.uniform(-5, -2), rng.uniform(-6, -2), rng.uniform(6, 8)), rng.uniform(60, 110)),
        Light((rng.uniform(3, 6), rng.uniform(-8, -4), rng.uniform(4, 6)), rng.uniform(15, 30)),
        Light((rng.uniform(-3, 3), rng.uniform(4, 8), rng.uniform(7, 9)), rng.uniform(30, 60)),
    ]
    return Tabletop(
        label,
        camera,
        lights,
        radius,
        _place(radius, camera, nearest, rng),
        kind=rng.randint(_KINDS, size=objects),
        color=rng.randint(len(_COLORS), size=objects),
        tiles=rng.uniform(0.08, 0.65, 2),
        tiles_turn=rng.uniform(0, np.pi / 2),
        glossy=rng.random_sample(objects) < 0.5,
        turn=rng.uniform(0, np.pi / 2, objects),
    )


def _place(radius: Floats, camera: Camera, nearest: float | None, rng: np.random.RandomState) -> Floats:
    """Draw the centers of all objects [objects, 3].

    If ``nearest`` is given, the first object has this distance from the camera, and all others are farther away. If
    300 attempts do not suffice, all objects are placed again, with the same number and sizes. The number and the sizes
    of the objects therefore do not depend on the placement.

    Raises:
        RuntimeError: No places were found.
    """
    for _ in range(_RESTARTS):
        centers: list[Floats] = []
        for _ in range(300):
            own = float(radius[len(centers)])
            low = _NEAREST if nearest is None else nearest + _BEHIND
            # A uniform square of the distance makes the positions uniform over the ground.
            distance = float(np.sqrt(rng.uniform(low**2, _FAR**2)))
            if nearest is not None and not centers:
                distance = nearest
            along = np.sqrt(distance**2 - (camera.origin[2] - own) ** 2)
            angle = rng.uniform(-_SIDEWAYS, _SIDEWAYS) + np.arctan2(-camera.origin[0], -camera.origin[1])
            center = np.array([camera.origin[0] + along * np.sin(angle), camera.origin[1] + along * np.cos(angle), own])
            if _is_free(np.array([*centers, center]), radius[: len(centers) + 1], camera):
                centers.append(center)
            if len(centers) == len(radius):
                return np.array(centers)
    raise RuntimeError(f"found no places for {len(radius)} objects with nearest distance {nearest} and {camera}")


def _is_free(centers: Floats, radius: Floats, camera: Camera) -> bool:
    """Return whether the position of the last object is allowed.

    The object must be inside the image, must not touch another object, and may overlap others only slightly in the
    image.
    """
    pixels, scale = camera.project(centers)
    seen = radius * scale * 1.2  # the corners of a cube are outside of a sphere with the same radius
    if (pixels[-1] < seen[-1] + _MARGIN).any() or (pixels[-1] > raytracing.SIZE - seen[-1] - _MARGIN).any():
        return False
    ground = np.linalg.norm(centers[:-1, :2] - centers[-1, :2], axis=1)
    image = np.linalg.norm(pixels[:-1] - pixels[-1], axis=1)
    return bool(
        (ground > 1.2 * (radius[:-1] + radius[-1]) + _GAP).all() and (image > _APART * (seen[:-1] + seen[-1])).all()
    )


def paint(scene: Tabletop, seed: int) -> npt.NDArray[np.uint8]:
    """Render one image, uint8 [64, 64, 3]."""
    shapes: list[Shape] = []
    for center, radius, kind, color, glossy, turn in zip(
        scene.center, scene.radius.tolist(), scene.kind, scene.color, scene.glossy, scene.turn, strict=True
    ):
        material = (raytracing.glossy if glossy else raytracing.matte)(_COLORS[color].tolist())
        x, y, z = center.tolist()
        if kind == 0:
            shapes += raytracing.box((x, y, z), (radius * 0.85, radius * 0.85, radius), material, float(turn))
        elif kind == 1:
            shapes += raytracing.cylinder((x, y, 0.0), (x, y, 2 * z), radius, material)
        else:
            shapes += raytracing.sphere((x, y, z), radius, material)
    ground = raytracing.tiles([(gray,) * 3 for gray in scene.tiles.tolist()], _TILE)
    return raytracing.render(shapes, scene.camera, scene.lights, seed, ground, scene.tiles_turn)
