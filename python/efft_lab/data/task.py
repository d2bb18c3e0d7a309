"""Define the classes for a task: its description, collections of images, and data sets for training and evaluation.

The images of a task have four roles: ``train``, ``val``, ``trainval`` (both together) and ``test``. The images of one
role form a split.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from efft_lab.data.pictures import as_rgb, pillow

Role = Literal["train", "val", "trainval", "test"]
ROLES: tuple[Role, ...] = ("train", "val", "trainval", "test")

Kind = Literal["classification", "segmentation", "regression"]
IGNORED = 255  # class number in a mask that marks ignored pixels

Group = Literal["natural", "specialized", "structured"]  # the three groups of VTAB
Normalization = str | tuple[Sequence[float], Sequence[float]]

NORMALIZATIONS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


@dataclass(frozen=True)
class TaskInfo:
    """The description of a task, which is known without reading its images.

    Args:
        name: Name of the task for :func:`efft_lab.data.load`, or name of the folder.
        group: VTAB group; None for a user's own folder.
        classes: Number of classes, or number of values in regression.
        source: Source of the images, with the pinned version if the source has versions.
        license: License or terms of use, in a few words.
        class_names: One name per class or value, if known.
        download_bytes: Size of the download by :func:`efft_lab.data.fetch`; None without a download or if it is
            unknown.
        non_commercial: Whether the license forbids commercial use. Loading then needs ``allow_non_commercial=True``.
        baselines: Test accuracies in percent from :func:`efft_lab.data.trivial_baselines` for seed 0, if measured.
        kind: Kind of prediction: a class for each image, a class for each pixel, or values for each image.
    """

    name: str
    group: Group | None
    classes: int
    source: str
    license: str
    class_names: tuple[str, ...] | None = None
    download_bytes: int | None = None
    non_commercial: bool = False
    baselines: dict[str, float] | None = None
    kind: Kind = "classification"


class Images(Protocol):
    """Labeled images that can be read one at a time."""

    labels: npt.NDArray[np.int64]  # [n]

    def image(self, index: int) -> Any:
        """Return an image in its stored size as an RGB ``PIL.Image.Image``."""

    def target(self, index: int, image_size: int) -> Any:
        """Return the target of an image. By default, it is the label.

        In segmentation, the target has the size of the model's input, ``image_size`` pixels in height and width.
        """
        return int(self.labels[index])


class ArrayImages(Images):
    """Images in memory.

    Args:
        pixels: Images, uint8 [n, height, width] or [n, height, width, 3].
        labels: Labels, [n].
    """

    def __init__(self, pixels: npt.NDArray[np.uint8], labels: npt.NDArray[Any]) -> None:
        self.pixels = pixels
        self.labels = labels.astype(np.int64)

    def image(self, index: int) -> Any:
        return pillow().fromarray(self.pixels[index]).convert("RGB")


class FileImages(Images):
    """Image files, which are opened when an image is requested.

    Args:
        paths: One file per image.
        labels: Labels, [n].
    """

    def __init__(self, paths: Sequence[Path], labels: Sequence[int]) -> None:
        self.paths = list(paths)
        self.labels = np.asarray(labels, dtype=np.int64)

    def image(self, index: int) -> Any:
        path = self.paths[index]
        try:
            with pillow().open(path) as image:
                return as_rgb(image)
        except Exception as error:  # Pillow raises many types of errors, and few of them name the file
            raise OSError(f"cannot read the image {path}: {error}") from error

    def joined(self, other: "FileImages") -> "FileImages":
        """Return a collection with these images, followed by the images of another collection of the same kind."""
        return FileImages([*self.paths, *other.paths], [*self.labels.tolist(), *other.labels.tolist()])


class Split(NamedTuple):
    """The images of one role: a collection of images, and the positions of this role's images in the collection.

    Several roles may share a collection.
    """

    images: Images
    indices: npt.NDArray[np.int64]


Splits = dict[Role, Split]


class Preprocess:
    """Convert a PIL image to model input: resize it to a square (bicubic), scale it to 0..1, and normalize it.

    Images are not augmented. The VTAB-1K literature preprocesses images in the same way (``Resize((s, s), bicubic)``,
    ``ToTensor`` and ``Normalize`` of torchvision).

    Args:
        image_size: Height and width of the result, in pixels.
        normalization: ``"imagenet"``, ``"half"``, ``"none"`` or ``(mean, std)`` of three numbers each.

    Raises:
        ValueError: The name is unknown, or mean and std are not three numbers each.
    """

    def __init__(self, image_size: int, normalization: Normalization) -> None:
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
        self.image_size = image_size
        mean, std = _mean_and_std(normalization)
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)

    def __call__(self, image: Any) -> torch.Tensor:
        size = (self.image_size, self.image_size)
        pixels = np.array(image.resize(size, pillow().Resampling.BICUBIC))  # [s, s, 3]
        tensor = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div_(255)
        return tensor.sub_(self.mean).div_(self.std)


class ImageDataset(torch.utils.data.Dataset[tuple[torch.Tensor, Any]]):
    """A map-style data set with the images of one role.

    Its items are pairs (image, target). An image is an fp32 tensor [3, image_size, image_size]. A target is an int
    label in classification, a tensor of class numbers [image_size, image_size] in segmentation, and a tensor of numbers
    [values] in regression.

    Attributes:
        images: the collection that contains the images of this role. Other roles may share the collection.
        indices: positions of this role's images in the collection.
    """

    def __init__(self, split: Split, preprocess: Preprocess) -> None:
        self.images, self.indices = split
        self.preprocess = preprocess
        self.labels: npt.NDArray[np.int64] = self.images.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        target = self.images.target(int(self.indices[index]), self.preprocess.image_size)
        return self.preprocess(self.raw(index)), target

    def raw(self, index: int) -> Any:
        """Return an image before preprocessing, as an RGB ``PIL.Image.Image`` in its stored size."""
        return self.images.image(int(self.indices[index]))


class TaskData:
    """A loaded task: its description and one `ImageDataset` per role.

    Attributes:
        info: The task's `TaskInfo`.
        train, val: Data sets for selecting hyperparameters and the epoch (in VTAB-1K, 800 and 200 images).
        trainval: Union of train and val for the final run (in VTAB-1K, 1000 images).
        test: Test set, which should be read only once, after training.
    """

    def __init__(self, info: TaskInfo, splits: Splits, preprocess: Preprocess) -> None:
        self.info = info
        self.train = ImageDataset(splits["train"], preprocess)
        self.val = ImageDataset(splits["val"], preprocess)
        self.trainval = ImageDataset(splits["trainval"], preprocess)
        self.test = ImageDataset(splits["test"], preprocess)

    @property
    def classes(self) -> int:
        """Return the number of classes, or the number of values in regression."""
        return self.info.classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return one name per class or value. If no names are known, the names are numbers."""
        return self.info.class_names or tuple(str(label) for label in range(self.classes))

    def raw(self, role: Role, index: int) -> Any:
        """Return image ``index`` of a role before preprocessing, as an RGB ``PIL.Image.Image`` in its stored size."""
        if role not in ROLES:
            raise ValueError(f"unknown role {role!r}; the roles are {', '.join(ROLES)}")
        dataset: ImageDataset = getattr(self, role)
        return dataset.raw(index)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{role}={len(getattr(self, role))}" for role in ROLES)
        return f"TaskData({self.info.name!r}, classes={self.classes}, {sizes})"


def _mean_and_std(normalization: Normalization) -> tuple[Sequence[float], Sequence[float]]:
    if isinstance(normalization, str):
        if normalization not in NORMALIZATIONS:
            known = ", ".join(repr(name) for name in NORMALIZATIONS)
            raise ValueError(f"unknown normalization {normalization!r}; give {known} or (mean, std)")
        return NORMALIZATIONS[normalization]
    mean, std = normalization
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"normalization must be (mean, std) of three numbers each, std > 0; got {normalization!r}")
    return mean, std
