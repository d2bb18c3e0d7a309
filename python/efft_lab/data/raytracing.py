"""Render small scenes with the ray tracer Mitsuba 3, for the tasks that resemble CLEVR and small NORB.

The scalar variant of Mitsuba runs on every machine, and its samples depend only on a seed. One machine therefore always
draws the same pixels. Another processor or another release of Mitsuba may have different rounding errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

SIZE = 64  # pixels, height and width
_SAMPLES = 9  # rays per pixel, for smooth edges
_DEPTH = 2  # maximum number of segments of a path; only direct light is rendered
_FIELD_OF_VIEW = 38.0  # degrees
_GROUND = 60.0  # half the edge length of the ground

Floats = npt.NDArray[np.float64]
Shape = dict[str, Any]  # a shape or a material in the form that Mitsuba's `load_dict` accepts
Point = Sequence[float]


@dataclass(frozen=True)
class Camera:
    """A pinhole camera with a square image.

    Args:
        origin: Position of the camera, [3].
        target: A point on the optical axis, [3].
    """

    origin: Floats
    target: Floats

    def project(self, points: Floats) -> tuple[Floats, Floats]:
        """Project points [n, 3] to the image.

        Return their positions in pixels from the top left corner [n, 2] (to the right and down), and the number of
        pixels per unit of length at each point [n].
        """
        forward = self.target - self.origin
        forward = forward / np.linalg.norm(forward)
        right = np.cross(forward, [0.0, 0.0, 1.0])
        right = right / np.linalg.norm(right)
        down = np.cross(forward, right)
        away = points - self.origin
        depth = away @ forward
        scale = SIZE / 2 / np.tan(np.radians(_FIELD_OF_VIEW) / 2) / depth
        return SIZE / 2 + np.stack([away @ right, away @ down], 1) * scale[:, None], scale


@dataclass(frozen=True)
class Light:
    """A point lamp.

    Args:
        place: Position of the lamp, [3].
        power: Radiant intensity of the lamp, the same in all directions and color channels.
    """

    place: Point
    power: float


def mitsuba() -> Any:
    """Import and return Mitsuba with its scalar variant. If it is missing, the error explains how to install it."""
    try:
        import mitsuba
    except ImportError as error:
        raise ImportError(
            "this task's images are ray traced with mitsuba: pip install 'efft-kernels[render]'"
        ) from error
    mitsuba.set_variant("scalar_rgb")
    return mitsuba


def render(
    shapes: Sequence[Shape],
    camera: Camera,
    lights: Sequence[Light],
    seed: int,
    ground: Shape | None = None,
    turn: float = 0.0,
) -> npt.NDArray[np.uint8]:
    """Render shapes on a large ground.

    Args:
        shapes: Shapes from :func:`sphere`, :func:`box` and :func:`cylinder`.
        camera: Position and direction of the camera.
        lights: Point lamps.
        seed: Seed for the positions of the rays within the pixels.
        ground: Material of the ground; by default, gray.
        turn: Rotation of the ground about the vertical axis in radians.

    Returns:
        Image, uint8 [64, 64, 3], in sRGB.
    """
    mi = mitsuba()
    ground_to_world = mi.ScalarTransform4f().rotate([0, 0, 1], float(np.degrees(turn))).scale([_GROUND, _GROUND, 1])
    origin, target = (values.tolist() for values in (camera.origin, camera.target))
    scene: dict[str, Any] = {
        "type": "scene",
        "integrator": {"type": "path", "max_depth": _DEPTH},
        "sensor": {
            "type": "perspective",
            "fov": _FIELD_OF_VIEW,
            "to_world": mi.ScalarTransform4f().look_at(origin=origin, target=target, up=[0, 0, 1]),
            "film": {"type": "hdrfilm", "width": SIZE, "height": SIZE, "rfilter": {"type": "box"}},
            "sampler": {"type": "multijitter", "sample_count": _SAMPLES},
        },
        "ground": {"type": "rectangle", "to_world": ground_to_world, "bsdf": ground or matte((0.4,) * 3)},
    }
    for number, light in enumerate(lights):
        intensity = {"type": "rgb", "value": [light.power] * 3}
        scene[f"light{number}"] = {"type": "point", "position": list(light.place), "intensity": intensity}
    for number, shape in enumerate(shapes):
        scene[f"shape{number}"] = shape
    linear = np.array(mi.render(mi.load_dict(scene), seed=seed))[:, :, :3].clip(0, 1)
    return np.rint(255 * linear ** (1 / 2.2)).astype(np.uint8)


def matte(color: Point) -> Shape:
    """Return a matte material, like rubber."""
    return {"type": "diffuse", "reflectance": {"type": "rgb", "value": list(color)}}


def tiles(colors: Sequence[Point], edge: float) -> Shape:
    """Return a material for a ground of square tiles in two colors. ``edge`` is the edge length of a tile."""
    first, second = ({"type": "rgb", "value": list(color)} for color in colors)
    pairs = _GROUND / edge  # number of pairs of tiles along an edge of the ground, which is 2 * _GROUND long
    to_uv = mitsuba().ScalarTransform4f().scale([pairs, pairs, 1])
    return {
        "type": "diffuse",
        "reflectance": {"type": "checkerboard", "color0": first, "color1": second, "to_uv": to_uv},
    }


def glossy(color: Point) -> Shape:
    """Return a glossy material, between polished plastic and metal."""
    base = {"type": "rgb", "value": list(color)}
    return {"type": "principled", "base_color": base, "roughness": 0.3, "specular": 0.9, "metallic": 0.4}


def sphere(center: Point, radius: float, material: Shape) -> list[Shape]:
    return [{"type": "sphere", "center": list(center), "radius": radius, "bsdf": material}]


def box(center: Point, half: Point, material: Shape, turn: float = 0.0) -> list[Shape]:
    """Return a box with half edge lengths ``half``, rotated about its vertical axis by ``turn`` radians."""
    transform = mitsuba().ScalarTransform4f
    to_world = transform().translate(list(center)).rotate([0, 0, 1], float(np.degrees(turn))).scale(list(half))
    return [{"type": "cube", "to_world": to_world, "bsdf": material}]


def cylinder(start: Point, end: Point, radius: float, material: Shape) -> list[Shape]:
    """Return a cylinder with closed ends, as a tube and two disks."""
    transform = mitsuba().ScalarTransform4f
    shapes = [{"type": "cylinder", "p0": list(start), "p1": list(end), "radius": radius, "bsdf": material}]
    axis = np.subtract(end, start)
    up = [1.0, 0.0, 0.0] if abs(axis[2]) > 0.5 * np.linalg.norm(axis) else [0.0, 0.0, 1.0]
    for place, outwards in ((start, -axis), (end, axis)):
        target = np.add(place, outwards).tolist()
        to_world = transform().look_at(origin=list(place), target=target, up=up).scale([radius, radius, 1])
        shapes.append({"type": "disk", "to_world": to_world, "bsdf": material})
    return shapes
