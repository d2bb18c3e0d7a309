"""Test tasks from torchvision's data sets, with small files in torchvision's format and without network."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest

import efft_lab.data
from efft_lab.data import torchvision_sets

datasets = pytest.importorskip("torchvision.datasets", reason="needs the vision extra")


@pytest.mark.parametrize("name", torchvision_sets._SETS)
def test_table_fits_the_installed_torchvision(name: str) -> None:
    entry = torchvision_sets._SETS[name]
    constructor = getattr(datasets, entry.constructor)
    parameters = inspect.signature(constructor).parameters
    assert {"root", "download", *entry.arguments("test")} <= set(parameters)
    sources = "".join(inspect.getsource(kind) for kind in constructor.__mro__ if "torchvision" in kind.__module__)
    assert f"self.{entry.labels}" in sources


def write_idx(path: Path, data: np.ndarray) -> None:
    header = bytes([0, 0, 8, data.ndim]) + b"".join(size.to_bytes(4, "big") for size in data.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + data.astype(np.uint8).tobytes())


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """Write 1,200 training and 300 test images in torchvision's file format, and return their folder.

    torchvision finds these files and therefore downloads nothing.
    """
    for part, n in (("train", 1200), ("t10k", 300)):
        images = np.random.RandomState(n).randint(0, 256, (n, 28, 28))
        write_idx(tmp_path / f"tv/MNIST/raw/{part}-images-idx3-ubyte", images)
        write_idx(tmp_path / f"tv/MNIST/raw/{part}-labels-idx1-ubyte", np.arange(n) % 10)
    return tmp_path / "tv"


def test_thousand_training_images_and_the_whole_test_set(mnist: Path) -> None:
    task = efft_lab.data.load("torchvision:mnist", root=mnist, image_size=8)
    assert [len(task.train), len(task.val), len(task.trainval), len(task.test)] == [800, 200, 1000, 300]
    assert np.bincount(task.train.labels).tolist() == [80] * 10
    assert task.class_names[3] == "3 - three"
    image, label = task.test[13]
    assert (tuple(image.shape), label) == ((3, 8, 8), 3)
    oracle = datasets.MNIST(str(mnist), train=False)[13][0].convert("RGB")
    assert task.raw("test", 13).tobytes() == oracle.tobytes()


def test_limited_test_set(mnist: Path) -> None:
    task = efft_lab.data.load("torchvision:mnist", root=mnist, max_test=50)
    assert np.bincount(task.test.labels).tolist() == [5] * 10
    with pytest.raises(ValueError, match="max_test must be at least 1, got 0"):
        efft_lab.data.load("torchvision:mnist", root=mnist, max_test=0)


def test_own_test_set_of_eurosat_has_no_copies_of_training_images(
    tmp_path: Path, write_image: Callable[[Path, int], Path]
) -> None:
    for number in range(1300):
        write_image(tmp_path / f"eurosat/2750/class{number % 10}/{number}.png", number)
    for number in range(0, 100):
        write_image(tmp_path / f"eurosat/2750/class{number % 10}/copy-{number}.png", number)
    first, other = (efft_lab.data.load("torchvision:eurosat", root=tmp_path, seed=seed) for seed in (0, 1))
    assert len(first.trainval) == 1000
    assert len(first.test) == pytest.approx(280, abs=10)
    test = {first.raw("test", index).tobytes() for index in range(len(first.test))}
    assert test == {other.raw("test", index).tobytes() for index in range(len(other.test))}
    for task in (first, other):
        assert not test & {task.raw("trainval", index).tobytes() for index in range(1000)}


def test_several_official_parts_make_one_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    class Flowers102:
        """Provide three parts, train, val and test, with 600 images each. The red channel identifies the part."""

        def __init__(self, root: str, split: str, download: bool) -> None:
            self.red = {"train": 10, "val": 20, "test": 30}[split]
            self._labels = [index % 102 for index in range(600)]

        def __len__(self) -> int:
            return 600

        def __getitem__(self, index: int):
            return Image.new("RGB", (1, 1), (self.red, index % 102, 0)), index % 102

    monkeypatch.setattr(datasets, "Flowers102", Flowers102)
    task = efft_lab.data.load("torchvision:flowers102", root=tmp_path, image_size=4)
    drawn = [(task.raw("trainval", index).getpixel((0, 0)), task.trainval[index][1]) for index in range(1000)]
    assert {red for (red, _, _), _ in drawn} == {10, 20}
    assert all(green == label for (_, green, _), label in drawn)
    assert {task.raw("test", index).getpixel((0, 0))[0] for index in range(600)} == {30}


@pytest.mark.parametrize("error", [URLError("no route"), RuntimeError("Error downloading")])
def test_no_network(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "CIFAR100", offline)
    with pytest.raises(ConnectionError, match=r"could not provide torchvision:cifar100 .*needs a network once"):
        efft_lab.data.load("torchvision:cifar100", root=tmp_path)


def test_non_commercial_licences() -> None:
    for name in ("torchvision:svhn", "torchvision:aircraft"):
        with pytest.raises(PermissionError, match="forbids commercial use"):
            efft_lab.data.load(name)
