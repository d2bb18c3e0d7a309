"""A task: what it is, where its pixels come from, and the data sets that training and evaluation read."""

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
IGNORED = 255  # in a mask: a pixel that counts for nothing

Group = Literal["natural", "specialized", "structured"]  # VTAB's three
Normalization = str | tuple[Sequence[float], Sequence[float]]

NORMALIZATIONS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


@dataclass(frozen=True)
class TaskInfo:
    """What is known about a task without reading its images.

    Args:
        name: The name that `efft_lab.data.load` takes, or the folder's name.
        group: VTAB group; None for a user's own folder.
        classes: Number of classes; of values in regression.
        source: Where the images come from, with the pinned version where there is one.
        licence: Licence or terms of use, in a few words.
        class_names: One name per class or value, where known.
        download_bytes: Size of what `efft_lab.data.fetch` downloads; None where that is nothing or unknown.
        non_commercial: The licence forbids commercial use; loading needs ``allow_non_commercial=True``.
        baselines: Test accuracy in percent of `efft_lab.data.trivial_baselines` for seed 0, where measured.
        kind: What is predicted: a class for each image, a class for each pixel, or values for each image.
    """

    name: str
    group: Group | None
    classes: int
    source: str
    licence: str
    class_names: tuple[str, ...] | None = None
    download_bytes: int | None = None
    non_commercial: bool = False
    baselines: dict[str, float] | None = None
    kind: Kind = "classification"


class Images(Protocol):
    """Labelled images that can be drawn one at a time."""

    labels: npt.NDArray[np.int64]  # [n]

    def image(self, index: int) -> Any:
        """The image as it is stored, as an RGB ``PIL.Image.Image`` of its own size."""

    def target(self, index: int, image_size: int) -> Any:
        """What is to be predicted for an image that is resized to a square of `image_size` pixels: its label."""
        return int(self.labels[index])


class ArrayImages(Images):
    """Images in memory.

    Args:
        pixels: uint8, [n, height, width] or [n, height, width, 3].
        labels: [n].
    """

    def __init__(self, pixels: npt.NDArray[np.uint8], labels: npt.NDArray[Any]) -> None:
        self.pixels = pixels
        self.labels = labels.astype(np.int64)

    def image(self, index: int) -> Any:
        return pillow().fromarray(self.pixels[index]).convert("RGB")


class FileImages(Images):
    """Image files, opened when they are asked for.

    Args:
        paths: One file per image.
        labels: [n].
    """

    def __init__(self, paths: Sequence[Path], labels: Sequence[int]) -> None:
        self.paths = list(paths)
        self.labels = np.asarray(labels, dtype=np.int64)

    def image(self, index: int) -> Any:
        path = self.paths[index]
        try:
            with pillow().open(path) as image:
                return as_rgb(image)
        except Exception as error:  # missing, damaged or too large: Pillow has many errors, and few name the file
            raise OSError(f"cannot read the image {path}: {error}") from error

    def joined(self, other: "FileImages") -> "FileImages":
        """These images and then those of another collection of the same kind."""
        return FileImages([*self.paths, *other.paths], [*self.labels.tolist(), *other.labels.tolist()])


class Split(NamedTuple):
    """The images of one role: positions into a collection that several roles may share."""

    images: Images
    indices: npt.NDArray[np.int64]


Splits = dict[Role, Split]


class Preprocess:
    """PIL image to model input: bicubic resize to a square, scale to 0..1, normalise. No augmentation.

    This is the recipe of the VTAB-1K literature: ``Resize((s, s), bicubic)``, ``ToTensor``, ``Normalize``.

    Args:
        image_size: Height and width of the result, in pixels.
        normalization: ``"imagenet"``, ``"half"``, ``"none"`` or ``(mean, std)`` of three numbers each.

    Raises:
        ValueError: An unknown name, or a mean and std that are not three numbers each.
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
    """One role of a task as a map-style data set of (float tensor [3, image_size, image_size], target).

    A target is an int label, in segmentation a tensor of class numbers [image_size, image_size], and in regression one
    of numbers [values].

    Attributes:
        images: the collection that this role's images are drawn from; other roles may share it.
        indices: positions in it.
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
        """The image before preprocessing: an RGB ``PIL.Image.Image`` of its own size."""
        return self.images.image(int(self.indices[index]))


class TaskData:
    """A loaded task: its description and one `ImageDataset` per role.

    Attributes:
        info: The task's `TaskInfo`.
        train, val: To choose hyperparameters and the epoch (VTAB-1K: 800 and 200 images).
        trainval: Both, for the final run (VTAB-1K: 1000 images).
        test: To be read once, at the end.
    """

    def __init__(self, info: TaskInfo, splits: Splits, preprocess: Preprocess) -> None:
        self.info = info
        self.train = ImageDataset(splits["train"], preprocess)
        self.val = ImageDataset(splits["val"], preprocess)
        self.trainval = ImageDataset(splits["trainval"], preprocess)
        self.test = ImageDataset(splits["test"], preprocess)

    @property
    def classes(self) -> int:
        """Number of classes, or of values in regression."""
        return self.info.classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class or value; their numbers where no names are known."""
        return self.info.class_names or tuple(str(label) for label in range(self.classes))

    def raw(self, role: Role, index: int) -> Any:
        """Image ``index`` of a role before preprocessing, as an RGB ``PIL.Image.Image``: for pictures and checks."""
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
