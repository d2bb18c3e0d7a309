"""``TrainConfig``: everything that decides the outcome of a training run; it goes through JSON unchanged."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from efft.config import AdapterConfig
from efft.methods import METHODS, EfftConfig
from efft.saving.files import read_json, replace_file
from efft_lab import typed
from efft_lab.backbones import DEFAULT
from efft_lab.train import methods

_ADAPTER_MARKS = ("format_version", "method")  # what EfftConfig.to_dict adds to its fields


@dataclass(frozen=True)
class TrainConfig:
    """A training run. The defaults are the recipe of the EFFT paper's public code (VTAB-1k: 1000 images, 100 epochs).

    What cannot change a result (where to write, whether to resume) is an argument of `efft_lab.train.run` instead.
    """

    data: str = "mnist5k"
    """Data set: a known name or a folder; see `efft data list`."""

    task: Literal["classification", "segmentation", "regression"] = "classification"
    """A class for each image, a class for each pixel (a folder of images and masks), or values for each image (a CSV
    file of images and values)."""

    regression_loss: Literal["mse", "l1"] = "mse"
    """What regression lowers: the squared error or its size, of values divided by their standard deviation."""

    data_root: str | None = None
    """Folder with the data set's files, where it is not one that can be fetched."""

    data_seed: int = 0
    """Which images of a packaged, generated or torchvision set train and which validate; VTAB-1K's are fixed."""

    max_test: int | None = None
    """Use at most so many test images, always the same ones; by default all."""

    allow_non_commercial: bool = False
    """Accept data sets whose licence forbids commercial use."""

    model: str = DEFAULT
    """The embedded backbone or any timm model name."""

    checkpoint: str | None = None
    """File with backbone weights: .npz, .pth, .pt or .safetensors."""

    pretrained: bool = True
    """Load published weights if no checkpoint is given; otherwise start at random."""

    image_size: int | None = None
    """Input height and width in pixels; by default the model's own."""

    normalization: Literal["imagenet", "half", "none"] = "imagenet"
    """Of pixels: ImageNet mean and std; mean and std 0.5; or plain 0..1."""

    method: str = "efft"
    """What to train: efft or another method of `efft.methods` (its factors and the head), linear (the head alone), full
    (every weight), or a method to compare with: adapter, adaptformer, bitfit, peft_lora, ssf, vpt_deep."""

    efft: EfftConfig = field(default_factory=EfftConfig)
    """The adapter (method efft only)."""

    adapter: dict[str, int | float | str | list[int] | list[str] | None] | None = None
    """Settings of another method than efft, for configuration files; those left out keep the method's defaults."""

    protocol: Literal["select", "final"] = "select"
    """select: train on the train split (VTAB-1K: 800 images), keep the epoch that is best on the val split (200).
    final: train on both, keep the last epoch. The test split is read once, at the very end."""

    seed: int = 42
    """Of initialisation, data order, dropout and stochastic depth."""

    epochs: int = 100
    """Passes over the training images."""

    batch_size: int = 64
    """Images per update, over all processes; an incomplete last batch is dropped."""

    lr: float = 1e-3
    """Peak learning rate of AdamW."""

    weight_decay: float = 1e-4
    """Of AdamW, on factors and head."""

    drop_path: float = 0.1
    """Rate of stochastic depth."""

    prune_at: int | None = None
    """Epochs after which the ranks are cut to what the update then needs (method efft, one process only): the
    optimizer's moments start anew, and only later epochs can be selected."""

    prune_keep: float = 0.99
    """Share of each group's squared update that the cut keeps; see `efft.prune`."""

    warmup: float = 0.1
    """Share of the schedule that is linear warm-up. By epoch, the first two epochs run at warmup_lr."""

    warmup_lr: float = 1e-6
    """Learning rate at the start of the warm-up."""

    min_lr: float = 1e-5
    """Learning rate at the end of the cosine."""

    schedule_per: Literal["epoch", "update"] = "epoch"
    """Change the learning rate after every epoch (as the paper's code does) or after every update."""

    amp: Literal["no", "bf16", "fp16"] = "no"
    """Autocast type, in training and evaluation; fp16 (with loss scaling) needs a GPU."""

    eval_batch_size: int = 256
    """Images per evaluation step, over all processes."""

    workers: int = 0
    """Data loading processes."""

    log_every: int = 10
    """Updates between step records in metrics.jsonl, starting with the first."""

    checkpoint_every: int | None = None
    """Updates between checkpoints; by default, and in any case, one is written after each epoch."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            typed.check(name, getattr(self, name), hint)
        methods.check(self)
        at_least = {
            "epochs": 1,
            "batch_size": 1,
            "eval_batch_size": 1,
            "log_every": 1,
            "checkpoint_every": 1,
            "workers": 0,
            "lr": 0,
            "weight_decay": 0,
            "warmup_lr": 0,
            "min_lr": 0,
        }
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.prune_at is not None and not (self.method == "efft" and 1 <= self.prune_at < self.epochs):
            raise ValueError(
                f"prune_at must be an epoch of method efft before the last, 1 to {self.epochs - 1}, got "
                f"{self.prune_at} with method {self.method!r}"
            )
        if not 0 < self.prune_keep <= 1:
            raise ValueError(f"prune_keep must be in (0, 1], got {self.prune_keep}")
        for name in ("drop_path", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")

    def adapter_config(self) -> AdapterConfig | None:
        """What `efft.apply` puts into the model; None for the methods without factors.

        Raises:
            ValueError: `adapter` has an unknown field (with the nearest known one) or an unusable value.
        """
        if self.method not in METHODS:
            return None
        if self.method == EfftConfig.method:
            return self.efft
        adapter = self.adapter or {}
        _check_names(adapter, METHODS[self.method])
        return METHODS[self.method].from_dict(adapter)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return values | {"efft": self.efft.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """The inverse of `to_dict`; fields left out keep their defaults.

        Raises:
            ValueError: unknown field (with the nearest known one) or unusable value.
        """
        adapter = values.get("efft", {})
        typed.check("efft", adapter, dict)
        for given, known in ((values, cls), (adapter, EfftConfig)):
            _check_names(given, known)
        return cls(**values | {"efft": EfftConfig.from_dict(adapter)})

    def save(self, path: str | Path) -> None:
        """Writes the fields to a JSON file."""
        replace_file(Path(path), (json.dumps(self.to_dict(), indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> "TrainConfig":
        """Reads a JSON file written by `save` (or by hand: fields left out keep their defaults).

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not a JSON object, unknown field or unusable value.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no configuration file {path}")
        values = read_json(Path(path))
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
        return cls.from_dict(values)


def _check_names(given: Mapping[str, Any], known: Any) -> None:
    names = [item.name for item in dataclasses.fields(known)]
    typed.check_names("the training configuration", [n for n in given if n not in _ADAPTER_MARKS], names)
