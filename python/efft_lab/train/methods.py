"""Every method that can be trained, in one registry: factors of ``efft.methods``, the head, all weights, baselines.

A :class:`Method` says which settings it reads, what it changes in a model, and how what it trained is saved and loaded.
The rest of the laboratory asks :data:`METHODS` and never compares names. A method of ``efft.methods`` is in the
registry by itself; a baseline is one file and one line, see :mod:`efft_lab.baselines`.
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

#: What ``AdapterConfig.to_dict`` adds to the fields.
ADAPTER_MARKS = ("format_version", "method")


class Method(ABC):
    """A way to train a model.

    Attributes:
        saved: name of the file or folder that :meth:`save` writes.
        group: field of ``TrainConfig`` that holds the settings; None for a method without settings.
        any_model: it trains models of any kind, not only timm's vision transformers.
        prunable: ``efft.prune`` can cut its ranks during the run.
        head_alone: it trains nothing but the classifier, so what the classifier sees can be computed once.
        whole: what it saves holds all weights of the model, so loading needs no weights of a base.
    """

    saved: ClassVar[str]
    group: str | None = None
    any_model: ClassVar[bool] = True
    prunable: ClassVar[bool] = False
    head_alone: ClassVar[bool] = False
    whole: ClassVar[bool] = False

    def setting_types(self) -> dict[str, Any]:
        """Name of each setting to its type."""
        return {}

    def read(self, values: Any) -> Any:
        """The settings, in the form that :meth:`apply` takes, from the value of the field :attr:`group`.

        Raises:
            ValueError: an unknown setting, or a value that the method cannot use.
        """
        return values

    @abstractmethod
    def apply(self, model: nn.Module, settings: Any) -> None:
        """Changes the model in place: adds what the method adds, and freezes what it does not train."""

    def parameter_groups(self, model: nn.Module, lr: float, weight_decay: float) -> Iterable[Any]:
        """What the optimizer gets, for a model to which the method was applied."""
        return efft.parameter_groups(model, lr, weight_decay)

    def save(self, model: nn.Module, folder: Path, info: Mapping[str, Any]) -> Path:
        """Writes what was trained.

        Args:
            model: the trained model.
            folder: of the run.
            info: facts about the base and the result, for an adapter's own description.

        Returns:
            The file or folder, ``folder / self.saved``.
        """
        return _write_tensors(folder / self.saved, trained_state(model))

    def load(self, model: nn.Module, settings: Any, path: Path) -> None:
        """Puts what :meth:`save` wrote into a fresh base model, in place.

        Raises:
            ValueError: the file is damaged, or made for another model.
        """
        self.apply(model, settings)
        restore_trained_state(model, read_tensors(path))


class Factors(Method):
    """A method of ``efft.methods``: its factors and the head train, and are saved as an adapter.

    Args:
        kind: type of its settings.
        group: see :class:`Method`.
    """

    saved = "adapter"

    def __init__(self, kind: type[AdapterConfig], group: str = "adapter") -> None:
        self.kind, self.group = kind, group

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
        efft.fuse(model)  # as in training, so that the results are rounded alike


class Efft(Factors):
    """The method of the library, with a field of its own in ``TrainConfig``."""

    prunable = True

    def __init__(self) -> None:
        super().__init__(EfftConfig, group="efft")


class Head(Method):
    """The linear probe."""

    saved = "head.safetensors"
    head_alone = True

    def apply(self, model: nn.Module, settings: None) -> None:
        efft.freeze_backbone(model)


class Full(Method):
    """Full fine-tuning: every weight trains."""

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
    """Whatever a function leaves trainable in a model.

    Args:
        change: adapts and freezes a model in place.
    """

    saved = "trained.safetensors"

    def __init__(self, change: Callable[[nn.Module], object]) -> None:
        self.change = change

    def apply(self, model: nn.Module, settings: None) -> None:
        self.change(model)


class Baseline(Method):
    """A method of :mod:`efft_lab.baselines`.

    Args:
        name: its name there.
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


#: Every method by its name in ``TrainConfig.method``.
METHODS: dict[str, Method] = {
    **{name: Factors(kind) for name, kind in efft.methods.METHODS.items()},
    EfftConfig.method: Efft(),
    "linear": Head(),
    "full": Full(),
    **{name: Baseline(name) for name in baselines.names()},
}


def saved_names() -> set[str]:
    """What the methods write in the folder of a run."""
    return {method.saved for method in METHODS.values()}


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy, on the CPU, of what training changes: the state dict without the frozen parameters."""
    return {name: tensor.cpu().clone() for name, tensor in _trained(model).items()}


@torch.no_grad()
def restore_trained_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copies the result of :func:`trained_state` back into the model, in place.

    Raises:
        ValueError: the state belongs to another model; nothing is changed then.
    """
    own = _trained(model)  # its tensors share the model's memory
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
    """The content of a safetensors file.

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
