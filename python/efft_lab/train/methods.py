"""Register every training method by name.

The training methods are the methods of ``efft.methods``, training of the head only, training of all weights, and the
baselines of :mod:`efft_lab.baselines`. A :class:`Method` defines its settings, the changes that it makes to a model,
and how the trained weights are saved and loaded. Other modules look methods up in :data:`METHODS` and depend on their
attributes, not on their names. Every method of ``efft.methods`` and every baseline is registered automatically.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import torch
from torch import nn

import efft
from efft.config import AdapterConfig
from efft.methods import EfftConfig
from efft.saving.files import replace_file
from efft_lab import baselines, typed
from efft_lab.backbones import load_strict

#: Keys that ``AdapterConfig.to_dict`` adds to the fields of a configuration.
ADAPTER_MARKS = ("format_version", "method")


class Method(ABC):
    """A way to train a model.

    Attributes:
        saved: name of the file or folder that :meth:`save` writes.
        group: field of ``TrainConfig`` that holds the settings; None for a method without settings.
        any_model: whether the method can train models that are not plain timm models, such as the model for
            segmentation.
        prunable: whether ``efft.prune`` can reduce the ranks of the method during the run.
        head_alone: whether the method trains only the classifier. The inputs of the classifier then need to be computed
            only once.
        whole: whether the saved file holds all weights of the model. If it does, loading a trained model does not need
            the weights of the base model.
        shares_backbone: whether ``efft.SharedBackbone`` can train several models of the method in one pass.
    """

    saved: ClassVar[str]
    group: str | None = None
    any_model: ClassVar[bool] = True
    prunable: ClassVar[bool] = False
    head_alone: ClassVar[bool] = False
    whole: ClassVar[bool] = False
    shares_backbone: bool = False

    def setting_types(self) -> dict[str, Any]:
        """Return a mapping from the name of each setting to its type."""
        return {}

    def read(self, values: Any) -> Any:
        """Return the settings in the form that :meth:`apply` accepts, from the value of the field :attr:`group`.

        Raises:
            ValueError: a setting is unknown, or the method cannot use a value.
        """
        return values

    @abstractmethod
    def apply(self, model: nn.Module, settings: Any) -> None:
        """Change the model in place: add the parts that the method needs, and freeze the parameters that it does not
        train."""

    def parameter_groups(self, model: nn.Module, lr: float, weight_decay: float) -> Iterable[Any]:
        """Return the parameter groups for the optimizer, for a model to which the method was applied."""
        return efft.parameter_groups(model, lr, weight_decay)

    def save(self, model: nn.Module, folder: Path, info: Mapping[str, Any]) -> Path:
        """Write the trained weights.

        Args:
            model: the trained model.
            folder: folder of the run.
            info: facts about the base model and the result, which an adapter stores in its description.

        Returns:
            Path of the file or folder, ``folder / self.saved``.
        """
        return _write_tensors(folder / self.saved, trained_state(model))

    def load(self, model: nn.Module, settings: Any, path: Path) -> None:
        """Adapt a new base model in place, and load the weights that :meth:`save` wrote.

        Raises:
            ValueError: the file is damaged or belongs to another model.
        """
        self.apply(model, settings)
        restore_trained_state(model, read_tensors(path))


class Factors(Method):
    """Train the factors of a method of ``efft.methods`` and the head, and save them as an adapter.

    Args:
        kind: type of the settings of the method.
        group: see :class:`Method`.
    """

    saved = "adapter"

    def __init__(self, kind: type[AdapterConfig], group: str = "adapter") -> None:
        self.kind, self.group = kind, group
        self.shares_backbone = kind.layer is AdapterConfig.layer  # other layers do more than update a weight

    def setting_types(self) -> dict[str, Any]:
        hints = get_type_hints(self.kind)
        return {field.name: hints[field.name] for field in dataclasses.fields(self.kind)}  # type: ignore[arg-type]

    def read(self, values: AdapterConfig | Mapping[str, Any] | None) -> AdapterConfig:
        if isinstance(values, AdapterConfig):
            return values
        values = values or {}
        names = [name for name in values if name not in ADAPTER_MARKS]
        typed.check_names("the training configuration", names, self.setting_types())
        return self.kind.from_dict(values)

    def apply(self, model: nn.Module, settings: AdapterConfig) -> None:
        efft.apply(model, settings)
        efft.fuse(model)

    def save(self, model: nn.Module, folder: Path, info: Mapping[str, Any]) -> Path:
        return Path(efft.save_adapter(model, folder / self.saved, info=dict(info)))

    def load(self, model: nn.Module, settings: AdapterConfig, path: Path) -> None:
        efft.load_adapter(model, path)
        efft.fuse(model)  # as in training; evaluation then has the same rounding errors


class Efft(Factors):
    """Train EFFT. Its settings are in the field ``efft`` of ``TrainConfig``."""

    prunable = True

    def __init__(self) -> None:
        super().__init__(EfftConfig, group="efft")


class Head(Method):
    """Train only the classifier (a linear probe)."""

    saved = "head.safetensors"
    head_alone = True

    def apply(self, model: nn.Module, settings: None) -> None:
        efft.freeze_backbone(model)


class Full(Method):
    """Train every weight (full fine-tuning)."""

    saved = "model.safetensors"
    whole = True

    def apply(self, model: nn.Module, settings: None) -> None:
        model.requires_grad_(True)

    def parameter_groups(self, model: nn.Module, lr: float, weight_decay: float) -> Iterable[Any]:
        return model.parameters()

    def save(self, model: nn.Module, folder: Path, info: Mapping[str, Any]) -> Path:
        return _write_tensors(folder / self.saved, model.state_dict())

    def load(self, model: nn.Module, settings: None, path: Path) -> None:
        load_strict(model, read_tensors(path), str(path))


class Changed(Method):
    """Train the parameters that a given function leaves trainable in a model.

    This method is not registered by default. :mod:`efft_lab.studies` registers it for single runs.

    Args:
        change: function that adapts a model in place and freezes the parameters that are not trained.
    """

    saved = "trained.safetensors"

    def __init__(self, change: Callable[[nn.Module], object]) -> None:
        self.change = change

    def apply(self, model: nn.Module, settings: None) -> None:
        self.change(model)


class Baseline(Method):
    """Train with a baseline of :mod:`efft_lab.baselines`.

    Args:
        name: name of the baseline.
    """

    saved = "trained.safetensors"
    any_model = False

    def __init__(self, name: str) -> None:
        self.name, self.group = name, "adapter"

    def setting_types(self) -> dict[str, Any]:
        return baselines.settings_of(self.name)

    def read(self, values: Mapping[str, Any] | None) -> dict[str, Any]:
        values = dict(values or {})
        baselines.check(self.name, values)
        return values

    def apply(self, model: nn.Module, settings: dict[str, Any]) -> None:
        baselines.apply(self.name, model, settings)


#: Maps the name in ``TrainConfig.method`` to the method.
METHODS: dict[str, Method] = {
    **{name: Factors(kind) for name, kind in efft.methods.METHODS.items()},
    EfftConfig.method: Efft(),
    "linear": Head(),
    "full": Full(),
    **{name: Baseline(name) for name in baselines.names()},
}


def saved_names() -> set[str]:
    """Return the names of the files and folders that methods write to the folder of a run."""
    return {method.saved for method in METHODS.values()}


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of the trainable parameters and of all buffers in the state dict, on the CPU."""
    return {name: tensor.cpu().clone() for name, tensor in _trained(model).items()}


@torch.no_grad()
def restore_trained_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copy the result of :func:`trained_state` back into the model, in place.

    Raises:
        ValueError: the state belongs to another model. The model is then left unchanged.
    """
    own = _trained(model)  # these tensors share memory with the model
    shapes = {name: list(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)}
    wrong = sorted(
        name for name in own.keys() | state.keys() if name not in own or shapes.get(name) != [*own[name].shape]
    )
    if wrong:
        expected = list(own[wrong[0]].shape) if wrong[0] in own else "nothing"
        raise ValueError(
            f"the saved state does not fit this {type(model).__name__}: expected {expected} for {wrong[0]}, got "
            f"{shapes.get(wrong[0], 'nothing')} ({len(wrong)} such tensors)"
        )
    for name, value in state.items():
        own[name].copy_(value)


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file.

    Raises:
        ValueError: the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error


def _write_tensors(path: Path, state: Mapping[str, torch.Tensor]) -> Path:
    from safetensors.torch import save

    replace_file(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}))
    return path
