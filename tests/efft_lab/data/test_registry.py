"""Test the registry of tasks: names, descriptions, the table of tasks, trivial baselines, and lazy imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import efft_lab.data


def test_names_are_unique_and_described() -> None:
    names = efft_lab.data.names()
    assert len(names) == len(set(names)) == 45
    for name in names:
        info = efft_lab.data.describe(name)
        assert info.name == name
        assert info.classes > 1
        assert info.source
        assert info.license
        assert info.group in ("natural", "specialized", "structured")


def test_unknown_name_lists_near_ones() -> None:
    with pytest.raises(ValueError, match=r"'cifar1' is not a known task \(similar names: .*cifar10"):
        efft_lab.data.describe("cifar1")
    with pytest.raises(ValueError, match=r"similar names: mnist5k, .*torchvision:mnist.*nor is there a folder"):
        efft_lab.data.load("mnist")
    with pytest.raises(ValueError, match=r"'\?' is not a known task \(known names: mnist5k, digits, "):
        efft_lab.data.fetch("?")


def test_non_commercial_set_needs_consent_before_anything_is_fetched(home: Path) -> None:
    for call in (efft_lab.data.load, efft_lab.data.fetch):
        with pytest.raises(
            PermissionError, match=r"elpv \(CC-BY-NC-SA-4\.0\) forbids commercial use.*--allow-non-comm"
        ):
            call("elpv")
    assert not home.exists()


def test_table_lists_every_task(home: Path) -> None:
    lines = efft_lab.data.list_table().splitlines()
    assert [line.split()[0] for line in lines] == ["name", *efft_lab.data.names()]
    assert lines[0].split() == ["name", "group", "classes", "trivial", "download", "ready", "license", "source"]
    row = next(line for line in lines if line.startswith("mnist5k"))
    assert row.split()[1:7] == ["natural", "10", "80.0", "1.4", "MB", "no"]
    assert not home.exists()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the generated tasks, which are drawn once for this module."""
    root = tmp_path_factory.mktemp("generated")
    for name in ("count", "x-location", "orientation"):
        efft_lab.data.fetch(name, root=root)
    return root


@pytest.mark.parametrize("name", ["count", "x-location", "orientation"])
def test_generated_tasks_and_their_recorded_baselines(name: str, drawn: Path) -> None:
    task = efft_lab.data.load(name, root=drawn)
    assert [len(task.train), len(task.val), len(task.trainval), len(task.test)] == [800, 200, 1000, 2000]
    recorded = efft_lab.data.describe(name).baselines
    # The tolerance is half a point: rounding in the linear solver may change a few of 2,000 predictions.
    assert efft_lab.data.trivial_baselines(task) == pytest.approx(recorded, abs=0.5)


def test_generated_task_is_drawn_once(drawn: Path, capfd: pytest.CaptureFixture[str]) -> None:
    efft_lab.data.load("x-location", root=drawn, seed=3)
    assert capfd.readouterr().err == ""


def test_baselines_of_a_task_that_is_trivial(tmp_path: Path) -> None:
    """One class has plain gray images, and the other has images with a white square.

    The predictors ink and pixels are perfect, and majority reaches the share of the larger class.
    """
    from PIL import Image

    for number in range(100):
        name = "white" if number % 4 else "dotted"
        image = Image.new("L", (16, 16), number)
        if name == "dotted":
            image.paste(255, (0, 0, 4, 4))
        (tmp_path / name).mkdir(exist_ok=True)
        image.save(tmp_path / name / f"{number}.png")
    task = efft_lab.data.load(tmp_path)
    assert efft_lab.data.trivial_baselines(task) == {"majority": 75.0, "ink": 100.0, "pixels": 100.0}
    assert efft_lab.data.nearest_neighbors(task) == 100.0


def test_nearest_neighbours_against_scikit_learn(drawn: Path) -> None:
    neighbors = pytest.importorskip("sklearn.neighbors", reason="needs scikit-learn to compare with")
    task = efft_lab.data.load("x-location", root=drawn, max_test=200)

    def pixels(data: efft_lab.data.ImageDataset) -> np.ndarray:
        return np.stack([np.asarray(data.raw(i).resize((16, 16), resample=4)).ravel() / 255 for i in range(len(data))])

    def score(fit: efft_lab.data.ImageDataset, judge: efft_lab.data.ImageDataset, k: int) -> float:
        return neighbors.KNeighborsClassifier(k).fit(pixels(fit), fit.labels).score(pixels(judge), judge.labels)

    best = max((1, 3, 5, 9, 15), key=lambda k: score(task.train, task.val, k))
    found = efft_lab.data.nearest_neighbors(task)
    assert found == pytest.approx(100 * score(task.trainval, task.test, best), abs=1)  # ties may be broken differently


def test_name_wins_over_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "orientation").mkdir()
    assert efft_lab.data.load("orientation", root=drawn).info.name == "orientation"
    with pytest.raises(ValueError, match="expected at least two class folders"):
        efft_lab.data.load("./orientation", root=drawn)


def test_import_fetches_nothing_and_loads_no_optional_package(tmp_path: Path) -> None:
    code = (
        "import sys, efft_lab.data; efft_lab.data.names(); efft_lab.data.list_table();"
        "heavy = {'torchvision', 'PIL', 'sklearn', 'timm', 'matplotlib', 'mlxtend', 'mitsuba', 'vizdoom'};"
        "heavy &= set(sys.modules);"
        "assert not heavy, heavy; print(callable(efft_lab.data.fetch))"
    )
    environment = {"PATH": "", "EFFT_HOME": str(tmp_path / "none"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "True", "")
    assert not (tmp_path / "none").exists()
