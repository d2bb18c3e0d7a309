"""Test rendered tasks: the labels fit the scenes and the pixels, drawing is reproducible, and archives are pinned.

If the pixels differ from the recorded ones, for example with another version of the renderer, the task must report it.
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

import efft_lab.data
from efft_lab.data import first_person, letters, raytracing, rendered, tabletop, toys
from efft_lab.data.rendered import Rendering
from efft_lab.data.splits import stable_rng
from efft_lab.data.task import TaskInfo

WHITE = raytracing.matte((0.8, 0.8, 0.8))
ABOVE = [raytracing.Light((0.0, 0.0, 8.0), 60.0)]


def needs(renderer: str) -> None:
    pytest.importorskip(renderer, reason=f"needs {renderer}, which the render extra installs")


@pytest.fixture(scope="module")
def tables() -> dict[str, list[tabletop.Tabletop]]:
    """Return the scenes of both tasks, without their pixels."""
    result = {}
    for name, classes in (("clevr-count", 8), ("clevr-distance", 6)):
        rng = stable_rng(0)
        result[name] = [tabletop.draw(name, k % classes, rng) for k in range(240)]
    return result


def test_count_is_the_number_of_objects(tables) -> None:
    assert [len(scene.center) for scene in tables["clevr-count"]] == [3 + k % 8 for k in range(240)]
    assert efft_lab.data.describe("clevr-count").class_names == ("3", "4", "5", "6", "7", "8", "9", "10")


def test_distance_is_that_of_the_nearest(tables) -> None:
    for scene in tables["clevr-distance"]:
        distance = np.sort(np.sqrt(((scene.center - scene.camera.origin) ** 2).sum(1)))
        assert 7 + 0.5 * scene.label < distance[0] < 7.5 + 0.5 * scene.label
        assert distance[1] > distance[0] + 0.1
    assert efft_lab.data.describe("clevr-distance").class_names[0] == "7 to 7.5"


@pytest.mark.parametrize("name", ["clevr-count", "clevr-distance"])
def test_nothing_but_the_label_tells_it(name: str, tables) -> None:
    scenes = tables[name]
    labels = [scene.label for scene in scenes]
    others = {
        "radius": [scene.radius.mean() for scene in scenes],
        "light": [scene.lights[0].power for scene in scenes],
        "height": [scene.camera.origin[2] for scene in scenes],
        "tilt": [scene.camera.target[1] for scene in scenes],
        "ground": [scene.tiles.mean() for scene in scenes],
        "glossy": [scene.glossy.mean() for scene in scenes],
    }
    if name == "clevr-distance":
        others["number"] = [len(scene.center) for scene in scenes]
    for what, values in others.items():
        assert abs(np.corrcoef(labels, values)[0, 1]) < 5 / np.sqrt(len(scenes)), what


def test_every_object_is_seen(tables) -> None:
    """Removing an object changes the picture at the object's projection."""
    needs("mitsuba")
    for number in (7, 15):  # each scene has ten objects
        scene = tables["clevr-count"][number]
        whole = tabletop.paint(scene, 0).astype(int)
        for left_out in range(len(scene.center)):
            keep = np.arange(len(scene.center)) != left_out
            parts = {
                name: getattr(scene, name)[keep] for name in ("radius", "center", "kind", "color", "glossy", "turn")
            }
            changed = abs(tabletop.paint(dataclasses.replace(scene, **parts), 0) - whole).max(2) > 12
            pixels, scale = scene.camera.project(scene.center)
            down, across = np.mgrid[:64, :64] + 0.5
            near = (
                np.hypot(across - pixels[left_out, 0], down - pixels[left_out, 1])
                < scene.radius[left_out] * scale[left_out]
            )
            assert changed[near].mean() > 0.3


def test_a_ball_is_drawn_where_the_camera_projects_it() -> None:
    needs("mitsuba")
    camera = raytracing.Camera(np.array([0.5, -8.0, 4.0]), np.array([0.0, 0.0, 0.2]))
    black = {"type": "diffuse", "reflectance": {"type": "rgb", "value": [0.0] * 3}}
    for center in ((1.0, 0.5, 0.4), (-1.2, 2.0, 1.5)):
        image = raytracing.render(
            raytracing.sphere(center, 0.4, WHITE), camera, [raytracing.Light((0.5, -8, 4), 90)], 0, black
        )
        down, across = np.nonzero(image[:, :, 0] > 40)
        (expected,), _ = camera.project(np.array([center]))
        assert abs(np.array([across.mean(), down.mean()]) + 0.5 - expected).max() < 0.3


def test_elevation_and_azimuth_are_what_the_labels_say() -> None:
    needs("mitsuba")
    rng = stable_rng(1)
    nose: toys.Toy = ([toys.Part("ball", (1.0, 0.0, 0.3), (0.0, 0.0, 0.0), 0.15, 0)], (0.8, 0.8, 0.8))
    for label in (0, 4, 8):
        view = toys.draw("norb-elevation", label, 50, rng)
        away = view.camera.origin - view.camera.target
        assert np.degrees(np.arcsin(away[2] / np.linalg.norm(away))) == pytest.approx(30 + 5 * label)
    for label in (0, 5, 13):
        view = toys.draw("norb-azimuth", label, 50, rng)
        assert view.azimuth == label
        turn = np.radians(20 * label)
        (expected,), _ = view.camera.project(np.array([[np.cos(turn), np.sin(turn), 0.3]]))
        with_nose, without = (toys.paint(view, toy, 0).astype(int) for toy in (nose, ([], nose[1])))
        right, below = np.rint(expected - 0.5).astype(int)
        assert abs(with_nose - without)[below, right] > 20


def test_toys_of_the_test_set_are_others() -> None:
    pool, test = (toys.make_toys(stable_rng(13, part)) for part in (0, 1))
    assert len(pool) == len(test) == 50
    assert not [toy for toy in pool if toy in test]


@pytest.mark.parametrize("name", ["clevr-count", "norb-elevation"])
def test_drawing_again_gives_the_same_pixels(name: str) -> None:
    needs("mitsuba")
    draw = rendered.RENDERINGS[name].draw
    first, again, test = draw(6, False), draw(6, False), draw(6, True)
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert first[0].dtype == np.uint8
    assert first[0].shape[:3] == (6, 64, 64)
    assert not np.array_equal(first[0], test[0])


def test_views_come_from_other_levels_in_the_test_set() -> None:
    assert not set(first_person.levels(False)) & set(first_person.levels(True))
    assert sorted([*first_person.levels(False), *first_person.levels(True)]) == list(range(1, 33))


def test_views_have_the_depth_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("vizdoom")
    monkeypatch.chdir(tmp_path)
    images, depth = first_person.collect(1, 8, stable_rng(0))
    assert len(images) == len(depth) > 5
    for first, again in zip((images, depth), first_person.collect(1, 8, stable_rng(0)), strict=True):
        assert np.array_equal(first, again)
    assert first_person.EDGES[0] <= depth.min() <= depth.max() < first_person.EDGES[-1]
    assert Path.cwd() == tmp_path
    assert os.listdir(tmp_path) == []  # the engine writes its own files to another folder


def test_views_are_drawn_in_equal_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test uses artificial levels, whose pictures contain their depth."""

    def collect(level: int, most: int, rng: np.random.RandomState) -> first_person.Views:
        depth = rng.uniform(6, 68, 60)
        images = np.tile(np.rint(depth).astype(np.uint8)[:, None, None, None], (1, 64, 64, 3))
        images[:, 1, 1, :2] = np.stack([np.arange(len(depth)) // 2, np.full(len(depth), level)], 1)  # the images ...
        depth[1::2], images[1::2] = depth[::2], images[::2]  # ... form pairs of equal images
        return images, depth

    monkeypatch.setattr(first_person, "collect", collect)
    images, labels = first_person.draw(62, True, stable_rng(0))
    assert sorted(np.bincount(labels).tolist()) == [10, 10, 10, 10, 11, 11]
    assert len({image.tobytes() for image in images}) == 62
    low, high = np.array(first_person.EDGES)[labels], np.array(first_person.EDGES)[labels + 1]
    depth = images[:, 0, 0, 0]
    assert (low - 1 < depth).all()
    assert (depth < high + 1).all()
    with pytest.raises(RuntimeError, match=r"expected \d+ views of class 0, the levels gave \d+"):
        first_person.draw(900, True, stable_rng(0))


def test_views_whose_middle_is_an_edge_are_refused() -> None:
    screen = np.full((384, 512, 3), 100, np.uint8)
    wall = np.full((384, 512), 25, np.uint8)
    image, depth = first_person._judge(screen, wall)
    assert (image.shape, depth) == ((64, 64, 3), 25.0)
    edge = wall.copy()
    edge[:, 256:] = 40
    assert first_person._judge(screen, edge) is None
    assert first_person._judge(screen, np.full_like(wall, 204)) is None  # only sky
    assert first_person._judge(np.zeros_like(screen), wall) is None  # a dark picture


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Return the package of a font family that contains matplotlib's font."""
    fonts = pytest.importorskip("matplotlib.font_manager", reason="needs matplotlib, which contains a font")
    data = Path(fonts.findfont("DejaVu Sans")).read_bytes()
    with tarfile.open(tmp_path / "font.tgz", "w:gz") as tar:
        for name in ("toy-latin-400-normal.woff", "toy-latin-900-normal.woff", "toy-latin-ext-400-normal.woff"):
            entry = tarfile.TarInfo(f"package/files/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return tmp_path / "font.tgz"


def test_the_letter_of_the_label_stands_in_the_middle(archive: Path) -> None:
    (face,) = letters._faces(archive)  # only one of the three is a Latin font of an accepted weight
    image = pytest.importorskip("PIL.Image")
    for letter in "AMQ":
        alone, mask = image.new("L", (192, 192)), image.new("L", (192, 192))
        letters._write(mask, ("I", letter, "I"), face)
        letters._write(alone, (" ", letter, " "), face)
        across = np.flatnonzero(np.asarray(alone).any(0))
        assert abs(across.mean() - 95.5) < 2
        middle = slice(across[0], across[-1] + 1)
        assert np.array_equal(np.asarray(mask)[:, middle], np.asarray(alone)[:, middle])
        assert np.asarray(mask).astype(bool).sum() > np.asarray(alone).astype(bool).sum()


def test_letters_are_drawn_from_the_seed_alone(archive: Path) -> None:
    faces, labels = letters._faces(archive), np.arange(26)
    first, again = (letters.draw(26, labels, faces, stable_rng(3)) for _ in range(2))
    assert np.array_equal(first, again)
    assert first.shape == (26, 64, 64, 3)
    assert min(image.std() for image in first) > 15  # each picture contains a visible letter


def test_archives_are_deleted_once_they_are_read(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(letters, "fetch_archive", lambda which: archive)
    assert len(letters.load_faces(letters.TEST[:1])) == 1
    assert not archive.exists()


def test_font_families_are_pinned_and_apart() -> None:
    names = [archive.package for archive in letters.TRAIN + letters.TEST]
    assert (len(letters.TRAIN), len(letters.TEST), len(set(names))) == (20, 10, 30)
    for archive in letters.TRAIN + letters.TEST:
        assert re.fullmatch("[0-9a-f]{64}", archive.sha256)
    size = sum(archive.size or 0 for archive in letters.TRAIN + letters.TEST)
    assert efft_lab.data.describe("font-letters").download_bytes == size


def test_archive_without_a_usable_face_is_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "font.tgz", "w:gz"):
        pass
    with pytest.raises(RuntimeError, match=r"font\.tgz holds no Latin face of weight 400 or 700: expected"):
        letters._faces(tmp_path / "font.tgz")


@pytest.mark.parametrize(("name", "renderer"), [("norb-azimuth", "mitsuba"), ("doom-distance", "vizdoom")])
def test_missing_renderer_says_what_to_install(name: str, renderer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, renderer, None)
    with pytest.raises(ImportError, match=rf"by|with {renderer}: pip install 'efft-kernels\[render\]'"):
        efft_lab.data.load(name)


def test_every_set_is_recorded_and_has_baselines() -> None:
    assert rendered.RECORDED.keys() == rendered.INFOS.keys()
    for name, info in rendered.INFOS.items():
        assert re.fullmatch("[0-9a-f]{64}", rendered.RECORDED[name])
        assert len(info.class_names or ()) == info.classes
        assert (info.baselines or {}).keys() == {"majority", "ink", "pixels"}


def test_another_rendering_is_used_and_said(
    monkeypatch: pytest.MonkeyPatch, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def draw(n: int, test: bool) -> rendered.Drawn:
        return stable_rng(int(test)).randint(0, 256, (n, 8, 8)).astype(np.uint8), np.arange(n) % 2

    info = TaskInfo("toy", "structured", 2, "drawn by a toy", "none needed")
    monkeypatch.setitem(rendered.RENDERINGS, "toy", Rendering(info, draw))
    monkeypatch.setitem(rendered.INFOS, "toy", info)
    monkeypatch.setitem(rendered.RECORDED, "toy", "0" * 64)
    task = efft_lab.data.load("toy")
    said = capfd.readouterr().err
    assert "drawing 3000 images of toy" in said
    digest = re.search(r"differ from those of the recorded results: sha256 (\w{12}), recorded 0{12}", said).group(1)
    assert task.info.source == f"drawn by a toy (another rendering: sha256 {digest})"
    assert [len(task.train), len(task.val), len(task.trainval), len(task.test)] == [800, 200, 1000, 1000]

    monkeypatch.setitem(rendered.RECORDED, "toy", rendered.fingerprint(rendered.build("toy")))
    capfd.readouterr()
    assert efft_lab.data.load("toy").info.source == "drawn by a toy"
    assert capfd.readouterr().err == ""
    assert rendered.RECORDED["toy"].startswith(digest)
