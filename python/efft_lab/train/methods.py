"""What a run can train, by name."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

import efft
from efft_lab import baselines

if TYPE_CHECKING:
    from efft_lab.train.config import TrainConfig


def _factors(model: nn.Module, config: "TrainConfig") -> None:
    efft.apply(model, config.adapter_config())
    efft.fuse(model)


def _linear(model: nn.Module, config: "TrainConfig") -> None:
    efft.freeze_backbone(model)


def _full(model: nn.Module, config: "TrainConfig") -> None:
    model.requires_grad_(True)


def _baseline(name: str, model: nn.Module, config: "TrainConfig") -> None:
    baselines.apply(name, model, config.adapter or {})


#: Name of a method to a function that adapts or freezes a model, in place.
METHODS: dict[str, Callable[[nn.Module, "TrainConfig"], None]] = {
    **dict.fromkeys(efft.methods.METHODS, _factors),
    "linear": _linear,
    "full": _full,
    **{name: partial(_baseline, name) for name in baselines.names()},
}


def check(config: "TrainConfig") -> None:
    """Refuses a method that does not exist, and settings that it would not read.

    Raises:
        ValueError: one of these, or a setting that the method does not have.
    """
    if config.method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {config.method!r}")
    if config.adapter and config.method in ("efft", "linear", "full"):
        where = "its settings are those of efft" if config.method == "efft" else "it has no settings"
        raise ValueError(f"adapter is not read by method {config.method!r} ({where}), got {config.adapter!r}")
    if config.method in baselines.METHODS and config.task == "segmentation":
        raise ValueError(f"method {config.method!r} changes whole timm models and cannot train one for segmentation")
    if config.method in baselines.METHODS:
        baselines.check(config.method, config.adapter or {})
    config.adapter_config()
