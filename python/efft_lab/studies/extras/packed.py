"""Pack the backbone and the images of every seed into files, for a machine without a network, and read these files.

A role is a set of images with a purpose, such as ``train/0`` (the training images of seed 0), ``dev`` or ``test``. The
images of ``dev``, and those on which runs of the stage ``explore`` train, are disjoint. Both are selected from all
training and validation images of the seeds of the suite.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from efft_lab import data
from efft_lab.train import TrainConfig, build

#: The seeds of the suite, and the seeds of the stage ``explore``.
SEEDS, EXPLORED = (0, 1, 2, 3, 4), (10, 11, 12, 13)
#: The maximum number of images in the role ``dev``.
DEV = 800
#: The number of images on which a run of the stage ``explore`` trains.
TRAINED = 1000


def pack_task(name: str, folder: Path, fields: Mapping[str, Any]) -> Path:
    """Write a file with all images of a task that any seed needs, and with their roles. Return the path of the file.

    If the images are larger than the input of the model or have different sizes, they are resized to the size of the
    input. Gray images are stored with one channel.

    Args:
        name: name of the task.
        folder: folder for the file.
        fields: fields of :class:`~efft_lab.train.TrainConfig`.
    """
    size = fields["image_size"]
    options: Any = {"image_size": size, "max_test": fields["max_test"]}
    tasks = {seed: data.load(name, seed=seed, **options) for seed in SEEDS}
    first = tasks[SEEDS[0]]
    pool = first.train.images
    used = np.unique(np.concatenate([task.trainval.indices for task in tasks.values()]))
    sources = [(pool, i) for i in used] + [(first.test.images, i) for i in first.test.indices]
    labels = np.array([images.labels[i] for images, i in sources])
    drawn = [images.image(int(i)) for images, i in sources]
    resize = drawn[0].size[0] > size or len({image.size for image in drawn}) > 1
    pixels = np.stack([_resized(image, size) if resize else np.array(image) for image in drawn])  # [n, s, s, 3]
    if (pixels == pixels[..., :1]).all():
        pixels = pixels[..., :1]
    roles = {
        f"{role}/{seed}": np.searchsorted(used, getattr(t, role).indices)
        for seed, t in tasks.items()
        for role in ("train", "val", "trainval")
    }
    roles["test"] = np.arange(len(used), len(sources))
    dev, *_ = data.splits.stratified_split(labels[: len(used)], [min(DEV, len(used) - TRAINED)], seed=77)
    roles["dev"], rest = dev, np.setdiff1d(np.arange(len(used)), dev)
    for seed in EXPLORED:
        (chosen,) = data.splits.stratified_split(labels[rest], [TRAINED], seed)
        roles[f"explore/{seed}"] = np.sort(rest[chosen])
    path = folder / f"{name}.npz"
    roles = {f"role/{role}": positions.astype(np.int32) for role, positions in roles.items()}
    np.savez_compressed(path, pixels=pixels, labels=labels, classes=np.array(first.classes), **roles)
    return path


def _resized(image: Any, size: int) -> Any:
    """Resize an image to a square as :class:`efft_lab.data.task.Preprocess` does. Return an array of its pixels."""
    from PIL import Image

    return np.array(image.resize((size, size), Image.Resampling.BICUBIC))


def _all_resized(pixels: Any, size: int) -> Any:  # uint8 [n, s, s, 1 or 3]
    from PIL import Image

    if pixels.shape[1] == size:
        return pixels
    return np.stack(
        [
            _resized(Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image), size).reshape(
                size, size, -1
            )
            for image in pixels
        ]
    )


def pack_base(folder: Path, fields: Mapping[str, Any], classes: Iterable[int]) -> Path:
    """Write a file with the backbone and with the initial classifiers of every seed. Return its path.

    Matrices of the backbone are stored in bf16, the dtype to which autocast converts them.

    Args:
        folder: folder for the file.
        fields: fields of :class:`~efft_lab.train.TrainConfig`.
        classes: the numbers of classes of the tasks.
    """
    config = TrainConfig.from_dict({**fields, "method": "linear"})
    state = build.create_model(config, 0).state_dict()
    rounded = {n: v.to(torch.bfloat16) if v.dim() > 1 and n.endswith(".weight") else v for n, v in state.items()}
    blank = dataclasses.replace(config, pretrained=False)
    for n in sorted(set(classes)):
        for seed in (*SEEDS, *EXPLORED):
            head: Any = build.create_model(dataclasses.replace(blank, seed=seed), n).get_submodule("head")
            rounded |= {f"heads/{seed}/{n}.{k}": v.clone() for k, v in head.state_dict().items()}
    path = folder / "base.npz"
    arrays: dict[str, Any] = {}
    for name, value in rounded.items():
        plain = value.contiguous().view(torch.int16) if value.dtype == torch.bfloat16 else value
        if value.dtype == torch.bfloat16:  # the high bytes, with the exponents, compress well if stored separately
            planes = plain.numpy().view(np.uint8).reshape(*value.shape, 2)
            arrays |= {f"{name}/low": planes[..., 0].copy(), f"{name}/high": planes[..., 1].copy()}
        else:
            arrays[name] = plain.numpy()
    np.savez_compressed(path, **arrays)
    return path


def read_base(folder: Path) -> dict[str, Tensor]:
    """Return the tensors that :func:`pack_base` wrote. Matrices are converted back to fp32."""
    found: dict[str, Tensor] = {}
    with np.load(folder / "base.npz") as file:
        for name in file.files:
            if name.endswith("/low"):
                stem = name.removesuffix("/low")
                planes = np.stack([file[name], file[f"{stem}/high"]], -1).view(np.int16)[..., 0]
                found[stem] = torch.from_numpy(planes.copy()).view(torch.bfloat16).float()
            elif not name.endswith("/high"):
                found[name] = torch.from_numpy(file[name])
    return found


class Packed:
    """The packed data in memory.

    Args:
        folder: the folder with the files.
        tasks: names of the tasks to read.
        fields: fields of :class:`~efft_lab.train.TrainConfig`.
        device: the device for the images and labels.

    Attributes:
        base: the backbone with an arbitrary classifier, on the CPU.
        classes: maps each task to its number of classes.
        pixels: images of all tasks, uint8 [n, 3, size, size].
        labels: labels of these images, [n].
        roles: maps (task, role) to the positions of its images in ``pixels``.
    """

    def __init__(
        self, folder: Path, tasks: Sequence[str], fields: Mapping[str, Any], device: torch.device | str = "cpu"
    ) -> None:
        state = read_base(folder)
        self.heads = {name: value for name, value in state.items() if name.startswith("heads/")}
        config = TrainConfig.from_dict({**fields, "method": "linear"})
        self.base: Any = build.create_model(dataclasses.replace(config, pretrained=False), 2)
        own = {name: value for name, value in state.items() if name not in self.heads}
        missing = self.base.load_state_dict(own, strict=False).missing_keys
        assert set(missing) <= {"head.weight", "head.bias"}, missing
        self.classes: dict[str, int] = {}
        self.roles: dict[tuple[str, str], Tensor] = {}
        pixels, labels, first = [], [], 0
        for task in tasks:
            with np.load(folder / f"{task}.npz") as file:
                images = torch.from_numpy(_all_resized(file["pixels"], fields["image_size"])).permute(0, 3, 1, 2)
                pixels.append(images.expand(-1, 3, -1, -1).contiguous())
                labels.append(torch.from_numpy(file["labels"]).long())
                self.classes[task] = int(file["classes"])
                for name in file.files:
                    if name.startswith("role/"):
                        role = name.removeprefix("role/")
                        self.roles[task, role] = torch.from_numpy(file[name]).long() + first
                first += len(labels[-1])
        self.pixels, self.labels = torch.cat(pixels).to(device), torch.cat(labels).to(device)

    def head(self, task: str, seed: int) -> dict[str, Tensor]:
        """Return the initial parameters of the classifier for a task and a seed."""
        return {f"head.{k}": self.heads[f"heads/{seed}/{self.classes[task]}.{k}"] for k in ("weight", "bias")}
