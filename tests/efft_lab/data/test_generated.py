"""Test the generated tasks: their labels follow from the pixels, and other properties of the images do not.

The *factors* of an image are the random numbers from which it is drawn, such as the position and size of an object. One
factor decides the label. The other factors must not be related to the label.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from efft_lab.data import generated
from efft_lab.data.splits import stable_rng

N = 480
HASHES = {
    "count": "dd458c95331c791450ba963f5b0b790a1664dfd5f5e3d1b3864181ae3832b00e",
    "x-location": "fc3d5d84c80ba4220227f9ec7484394bf9e8205aee917327a9f3da47fd08482b",
    "orientation": "cc9dca9969b5ac95629d76a31982ce49db1cc0ef5f342ecaa3bb129f39b7accd",
}


@pytest.fixture(scope="module")
def drawn() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {name: generated.generate(name, N, seed=0) for name in generated.INFOS}


@pytest.mark.parametrize("name", HASHES)
def test_pixels_never_change(name, drawn) -> None:
    images, labels = drawn[name]
    digest = hashlib.sha256(images[:64].tobytes() + labels[:64].astype("<i8").tobytes()).hexdigest()
    assert digest == HASHES[name], "the images changed: increase generated._FORMAT and note it in the change log"


@pytest.mark.parametrize("name", HASHES)
def test_classes_are_equally_frequent_and_seeds_differ(name, drawn) -> None:
    images, labels = drawn[name]
    classes = generated.INFOS[name].classes
    assert np.bincount(labels).tolist() == [N // classes] * classes
    other, _ = generated.generate(name, 16, seed=1)
    assert not np.array_equal(images[:16], other)


def test_count_is_the_number_of_separate_objects(drawn) -> None:
    ndimage = pytest.importorskip("scipy.ndimage", reason="needs scipy to count the objects")
    images, labels = drawn["count"]
    # The background is above 0.3 in every channel, and every object is below 0.15 in one channel. Pixels that touch at
    # a corner belong together, because a thin tip may run diagonally.
    objects = [ndimage.label(image.min(axis=2) < 0.25 * 255, structure=np.ones((3, 3)))[1] for image in images]
    assert (np.array(objects) - generated.FEWEST).tolist() == labels.tolist()


def test_x_location_is_the_centre_of_mass(drawn) -> None:
    images, labels = drawn["x-location"]
    ink = images.astype(float).sum(axis=1)  # [n, columns]
    centre = (ink * (np.arange(64) + 0.5)).sum(axis=1) / ink.sum(axis=1) / 64
    low = 0.2 + 0.6 * labels / 16
    slack = 0.1 / 64  # a tenth of a pixel
    assert (centre > low - slack).all()
    assert (centre < low + 0.6 / 16 + slack).all()


def test_orientation_is_the_direction_of_the_heavier_side(drawn) -> None:
    images, labels = drawn["orientation"]
    across, down = np.meshgrid(np.arange(64) + 0.5, np.arange(64) + 0.5)
    angles = []
    for image in images.astype(float):
        weight = image / image.sum()
        x, y = across - (weight * across).sum(), down - (weight * down).sum()
        # A heart is symmetric only about its axis v, so this third-order moment points along v.
        skew = weight * np.hypot(x, y)
        angles.append(np.arctan2((skew * y).sum(), (skew * x).sum()))
    # The label comes from the angle of the axis u, and v is a quarter turn away from u.
    error = np.array(angles) - np.pi / 2 - 2 * np.pi * (labels + 0.5) / 16
    error = (error + np.pi) % (2 * np.pi) - np.pi
    half_bin = np.pi / 16
    assert abs(np.median(error)) < 0.03
    assert (abs(error) < half_bin + 0.15).mean() > 0.95  # the estimate is inaccurate for hearts of five pixels
    assert (abs(error) < half_bin + 0.7).all()


def _unrelated(labels: np.ndarray, values: np.ndarray) -> bool:
    """Return whether neither the values nor their distance from the middle depend on the label (five sigma)."""
    limit = 5 / np.sqrt(len(labels))
    spread = abs(values - np.median(values))
    return all(abs(np.corrcoef(labels, column)[0, 1]) < limit for column in (values, spread))


@pytest.mark.parametrize("name", ["x-location", "orientation"])
def test_sprite_factors_do_not_tell_the_label(name) -> None:
    factors = generated.sprite_factors(name, 8000, stable_rng(9))
    free = {"x-location": ["shape", "y", "radius", "angle"], "orientation": ["x", "y", "radius"]}[name]
    for factor in free:
        assert _unrelated(factors.label, getattr(factors, factor)), factor
    decided = {"x-location": "x", "orientation": "angle"}[name]
    assert not _unrelated(factors.label, getattr(factors, decided))


def test_count_factors_do_not_tell_the_label() -> None:
    factors = generated.count_factors(8000, stable_rng(9))
    assert _unrelated(factors.label, factors.scale)
    for values in (factors.radius, factors.angle, factors.shape, factors.color, factors.ground, factors.slope):
        columns = values.reshape(8000, -1)
        for column in range(min(columns.shape[1], 9)):
            assert _unrelated(factors.label, columns[:, column])


def test_objects_keep_their_distance_and_stay_inside() -> None:
    factors = generated.count_factors(300, stable_rng(4))
    for index in range(300):
        objects = factors.label[index] + generated.FEWEST
        position, radius = factors.position[index, :objects], factors.radius[index, :objects]
        distance = np.linalg.norm(position[:, None] - position, axis=2) + np.eye(objects)
        assert (distance > radius[:, None] + radius + 0.0299).all()
        assert (position - radius[:, None] > 0.009).all()
        assert (position + radius[:, None] < 0.991).all()
