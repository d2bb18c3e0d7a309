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

    Settings that do not affect the result (the output folder, whether to resume) are options of the command instead.
    """

    data: str = "mnist5k"
    """Name of a known data set (`efft data list` prints all names), path of a folder of images, or, for regression,
    path of a CSV file."""

    task: Literal["classification", "segmentation", "regression"] = "classification"
    """Kind of prediction: one class per image (classification), one class per pixel (segmentation; the data is a folder
    of images and masks), or one or more values per image (regression; the data is a CSV file of images and values)."""

    regression_loss: Literal["mse", "l1"] = "mse"
    """Loss for regression: the mean squared error (mse) or the mean absolute error (l1) of the standardized values."""

    data_root: str | None = None
    """Folder with the files of a data set that cannot be downloaded."""

    data_seed: int = 0
    """Seed that selects the training and validation images, if the data set does not define them. It never changes the
    test images, and it has no effect on VTAB-1K."""

    max_test: int | None = None
    """Maximum number of test images; by default, all test images are used. Every run uses the same test images."""

    allow_non_commercial: bool = False
    """Accept data sets whose license forbids commercial use."""

    model: str = DEFAULT
    """Name of the backbone: dinov2_vits14_saliency (a small DINOv2 from a Python package) or any timm model."""

    checkpoint: str | None = None
    """File with the weights of the backbone (.npz, .pth, .pt or .safetensors), to use instead of published weights."""

    pretrained: bool = True
    """Whether to load published weights if no checkpoint is given. If False, training starts from random weights."""

    image_size: int | None = None
    """Height and width of the input in pixels; by default, the input size of the model."""

    normalization: Literal["imagenet", "half", "none"] = "imagenet"
    """Normalization of the pixels: with the mean and standard deviation of ImageNet (imagenet), with 0.5 for both
    (half), or none, which leaves values from 0 to 1."""

    method: str = "efft"
    """Training method: efft or another method of efft.methods (trains its factors and the head), linear (trains only
    the head), full (trains every weight), or a baseline (adapter, adaptformer, bitfit, peft_lora, ssf, vpt_deep). If
    the name is unknown, the error message lists all methods."""

    efft: EfftConfig = field(default_factory=EfftConfig)
    """Settings of the method efft."""

    adapter: dict[str, int | float | str | list[int] | list[str] | None] | None = None
    """Settings of a method other than efft, by name. It is easier to write them in a configuration file. Omitted
    settings keep the defaults of the method."""

    protocol: Literal["select", "final"] = "select"
    """select: train on the train split, and keep the weights of the epoch with the best score on the val split (in
    VTAB-1K, these splits have 800 and 200 images). final: train on both splits together, and keep the weights of the
    last epoch. Both protocols read the test split only once, after training."""

    seed: int = 42
    """Seed of initialization, data order, dropout and stochastic depth."""

    epochs: int = 100
    """Number of passes over the training images."""

    batch_size: int = 64
    """Number of images per update, summed over all processes. An incomplete last batch is dropped."""

    lr: float = 1e-3
    """Peak of AdamW's learning rate in the cosine schedule. A warm-up lowers the actual peak by a few percent, because
    the cosine starts together with the warm-up."""

    weight_decay: float = 1e-4
    """Weight decay of AdamW. It applies to all trained parameters, except the scales, diagonals, biases and norms that
    efft or another method of efft.methods trains outside the head."""

    drop_path: float = 0.1
    """Rate of stochastic depth."""

    prune_at: int | None = None
    """Number of epochs after which training reduces the ranks to those that the update needs at that time; by default,
    the ranks stay the same. This setting needs the method efft and a single process. After the reduction, the
    optimizer's moments start at zero again, and only later epochs can be selected."""

    prune_keep: float = 0.99
    """Share of the squared norm of the update that the reduction of the ranks (prune_at) keeps. The share applies to
    each group of layers that share factors."""

    warmup: float = 0.1
    """Share of the training that is used for a linear warm-up of the learning rate. If schedule_per is epoch, the first
    two epochs of a warm-up both run at warmup_lr."""

    warmup_lr: float = 1e-6
    """Learning rate at the start of the warm-up."""

    min_lr: float = 1e-5
    """Learning rate that the cosine schedule approaches at the end of the training."""

    schedule_per: Literal["epoch", "update"] = "epoch"
    """Whether the learning rate changes after every epoch (as in the EFFT paper's code) or after every update."""

    amp: Literal["no", "bf16", "fp16"] = "no"
    """Number format for autocast in training and evaluation (no: fp32 without autocast). fp16 needs a GPU and uses loss
    scaling."""

    eval_batch_size: int = 256
    """Number of images that are evaluated at a time, summed over all processes."""

    workers: int = 0
    """Number of additional processes that load data; 0 loads data in the training process."""

    log_every: int = 10
    """Number of updates between two records of the training loss in metrics.jsonl. The first update is always
    recorded."""

    checkpoint_every: int | None = None
    """Number of updates between two checkpoints within an epoch; by default, there are none within an epoch. A
    checkpoint is always written after each epoch."""

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
        if self.prune_at is not None and self.epochs == 1:
            raise ValueError(f"prune_at must be an epoch before the last, but epochs is 1; got {self.prune_at}")
        if self.prune_at is not None and not (METHODS[self.method].prunable and 1 <= self.prune_at < self.epochs):
            known = " or ".join(name for name, method in METHODS.items() if method.prunable)
            raise ValueError(
                f"prune_at needs method {known} and must be an epoch before the last, from 1 to {self.epochs - 1}, got "
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
            raise ValueError(f"method {self.method!r} supports only plain timm models and cannot train segmentation")
        self.settings()

    def settings(self) -> Any:
        """Return the settings of the method in the form that :meth:`efft_lab.train.methods.Method.apply` accepts.

        The result is None if the method has no settings.

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
