"""Define ``TrainConfig``, which holds every setting that affects the result of a training run."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from efft.config import AdapterConfig
from efft.methods import EfftConfig
from efft.saving.files import read_json, replace_file
from efft_lab import typed
from efft_lab.backbones import DEFAULT
from efft_lab.train.methods import ADAPTER_MARKS, METHODS


@dataclass(frozen=True)
class TrainConfig:
    """Configuration of a training run.

    The defaults are the recipe of the EFFT paper's public code (VTAB-1k: 1000 images, 100 epochs).

    Settings that cannot change a result (the output folder, whether to resume) are options of the command instead.
    """

    data: str = "mnist5k"
    """Name of a known data set (see `efft data list`) or path of a folder."""

    task: Literal["classification", "segmentation", "regression"] = "classification"
    """Kind of prediction: one class per image, one class per pixel (the data is a folder of images and masks), or one
    or more values per image (the data is a CSV file of images and values)."""

    regression_loss: Literal["mse", "l1"] = "mse"
    """Loss for regression: the squared or the absolute error. Both use values divided by their standard deviation."""

    data_root: str | None = None
    """Folder with the files of a data set that cannot be downloaded."""

    data_seed: int = 0
    """Seed of the split of a packaged, generated or torchvision set into training and validation images; VTAB-1K's
    splits are fixed."""

    max_test: int | None = None
    """Maximum number of test images. Every run uses the same images. By default, all test images are used."""

    allow_non_commercial: bool = False
    """Accept data sets whose license forbids commercial use."""

    model: str = DEFAULT
    """The embedded backbone or the name of any timm model."""

    checkpoint: str | None = None
    """File with backbone weights (.npz, .pth, .pt or .safetensors)."""

    pretrained: bool = True
    """Whether to load published weights if no checkpoint is given. If False, training starts from random weights."""

    image_size: int | None = None
    """Height and width of the input in pixels; by default, the input size of the model."""

    normalization: Literal["imagenet", "half", "none"] = "imagenet"
    """How pixels are normalized: by ImageNet's mean and standard deviation, by 0.5 and 0.5, or not at all (0 to 1)."""

    method: str = "efft"
    """Training method: efft or another method of efft.methods (trains its factors and the head), linear (trains only
    the head), full (trains every weight), or a baseline (adapter, adaptformer, bitfit, peft_lora, ssf, vpt_deep)."""

    efft: EfftConfig = field(default_factory=EfftConfig)
    """Settings of method efft."""

    adapter: dict[str, int | float | str | list[int] | list[str] | None] | None = None
    """Settings of a method other than efft, for configuration files; omitted settings keep the method's defaults."""

    protocol: Literal["select", "final"] = "select"
    """select: train on the train split (VTAB-1K: 800 images) and keep the epoch that is best on the val split (200).
    final: train on both and keep the last epoch. The test split is read once, at the very end."""

    seed: int = 42
    """Seed of initialization, data order, dropout and stochastic depth."""

    epochs: int = 100
    """Number of passes over the training images."""

    batch_size: int = 64
    """Number of images per update, summed over all processes; an incomplete last batch is dropped."""

    lr: float = 1e-3
    """Peak learning rate of AdamW."""

    weight_decay: float = 1e-4
    """Weight decay of AdamW, applied to the factors and the head."""

    drop_path: float = 0.1
    """Rate of stochastic depth."""

    prune_at: int | None = None
    """Number of epochs after which training reduces the ranks to those that the update needs at that time. This setting
    needs method efft and a single process. The optimizer's moments then start at zero again, and only later epochs can
    be selected."""

    prune_keep: float = 0.99
    """Share of the squared norm of each group's update that pruning keeps; see efft.prune."""

    warmup: float = 0.1
    """Share of the schedule used for linear warm-up. With schedule_per epoch, the first two epochs run at warmup_lr."""

    warmup_lr: float = 1e-6
    """Learning rate at the start of the warm-up."""

    min_lr: float = 1e-5
    """Learning rate at the end of the cosine schedule."""

    schedule_per: Literal["epoch", "update"] = "epoch"
    """Change the learning rate after every epoch (as the paper's code does) or after every update."""

    amp: Literal["no", "bf16", "fp16"] = "no"
    """Autocast type for training and evaluation; fp16 (with loss scaling) needs a GPU."""

    eval_batch_size: int = 256
    """Number of images per evaluation step, summed over all processes."""

    workers: int = 0
    """Number of processes that load data."""

    log_every: int = 10
    """Number of updates between step records in metrics.jsonl. The first update is always recorded."""

    checkpoint_every: int | None = None
    """Number of updates between checkpoints within an epoch. A checkpoint is always written after each epoch."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            typed.check(name, getattr(self, name), hint)
        self._check_method()
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
        if self.prune_at is not None and not (METHODS[self.method].prunable and 1 <= self.prune_at < self.epochs):
            known = " or ".join(name for name, method in METHODS.items() if method.prunable)
            raise ValueError(
                f"prune_at must be an epoch of method {known} before the last, 1 to {self.epochs - 1}, got "
                f"{self.prune_at} with method {self.method!r}"
            )
        if not 0 < self.prune_keep <= 1:
            raise ValueError(f"prune_keep must be in (0, 1], got {self.prune_keep}")
        for name in ("drop_path", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")

    def _check_method(self) -> None:
        """Raise an error for an unknown method and for settings that the method does not read."""
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        method = METHODS[self.method]
        if self.adapter and method.group != "adapter":
            where = f"its settings are those of {method.group}" if method.group else "it has no settings"
            raise ValueError(f"adapter is not read by method {self.method!r} ({where}), got {self.adapter!r}")
        if self.task == "segmentation" and not method.any_model:
            raise ValueError(f"method {self.method!r} changes whole timm models and cannot train one for segmentation")
        self.settings()

    def settings(self) -> Any:
        """Return the settings of the method in the form that its ``apply`` accepts, or None if it has no settings.

        Raises:
            ValueError: a setting is unknown (the message names the most similar known setting), or a value is invalid.
        """
        method = METHODS[self.method]
        return method.read(getattr(self, method.group)) if method.group else None

    def adapter_config(self) -> AdapterConfig | None:
        """Return the configuration of the adapter for ``efft.apply``, or None for a method without factors."""
        settings = self.settings()
        return settings if isinstance(settings, AdapterConfig) else None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return values | {"efft": self.efft.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Create a configuration from the result of :meth:`to_dict`. Omitted fields keep their defaults.

        Raises:
            ValueError: a field is unknown (the message names the most similar known field), or a value is invalid.
        """
        adapter = values.get("efft", {})
        typed.check("efft", adapter, dict)
        for given, known in ((values, cls), (adapter, EfftConfig)):
            names = [name for name in given if name not in ADAPTER_MARKS]
            typed.check_names("the training configuration", names, [item.name for item in dataclasses.fields(known)])
        return cls(**values | {"efft": EfftConfig.from_dict(adapter)})

    def save(self, path: str | Path) -> None:
        """Write the fields to a JSON file."""
        replace_file(Path(path), (json.dumps(self.to_dict(), indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> TrainConfig:
        """Read a JSON file written by :meth:`save` or by hand. Omitted fields keep their defaults.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file does not hold a JSON object, a field is unknown, or a value is invalid.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no configuration file {path}")
        values = read_json(Path(path))
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
        return cls.from_dict(values)
