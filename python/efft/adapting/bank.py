"""The factors of an adapted model, and what happens to them in each pass."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from efft.adapting import buffers
from efft.adapting.placing import Update, find_update
from efft.adapting.wrappers import plain_name, unwrap
from efft.config import AdapterConfig
from efft_kernels import FactorBank
from efft_kernels.nn.parameter import AdaptedParameter


class Bank(nn.ModuleDict):
    """All factors of an adapted model, its submodule ``efft``: group name to :class:`FactorBank`.

    Attributes:
        config: the configuration the model was adapted with.
        layers: names of the adapted weights: of layers their modules', of other weights the parameters'.
        plan: the groups as adapter files keep them.
        head: names of the modules trained beside the factors.
        enabled: False while the update is switched off or merged.
    """

    def __init__(self, factors: dict[str, FactorBank], config: AdapterConfig, head: list[str]) -> None:
        super().__init__(factors)
        self.config, self.head, self.enabled = config, head, True
        self.layers: list[str] = []
        self.plan: list[dict[str, Any]] = []
        self._idle_checked = False
        self._reads_checked: set[bool] = set()  # in which modes a pass has shown what is read
        self._readers: dict[str, str] = {}  # classes of the modules that read layers' weights, by names of the layers
        self._originals: dict[str, Any] = {}
        self._base_buffers: dict[str, Tensor] = {}  # what training may change, as it was
        self._still: list[nn.Module] = []  # kept in eval mode; no children, so that they keep their names
        self._requires_grad: dict[str, bool] = {}
        self._hooks: list[Any] = []

    def forward(self, x: Any) -> Any:
        """The identity: an ``nn.Sequential`` that was adapted runs the bank too, as its last child."""
        return x

    def train(self, mode: bool = True) -> Bank:
        """As ever; the bank is the model's last child, so this comes after the modules whose statistics are frozen."""
        super().train(mode)
        for module in self._still:
            module.training = False
        return self

    def banks(self) -> list[FactorBank]:
        """The groups' factors."""
        return [factors for factors in self.values() if isinstance(factors, FactorBank)]


def bank_of(model: nn.Module) -> Bank:
    """The factors of an adapted model; ValueError if it is not adapted."""
    bank = getattr(model, "efft", None)
    if not isinstance(bank, Bank):
        raise ValueError(
            f"this {type(model).__name__} is not adapted: call efft.apply(model, config) or efft.load_adapter(model, "
            f"path) first"
        )
    return bank


def adapted_layers(model: nn.Module) -> dict[str, Update]:
    """The updates of an adapted model by the names of their weights: of layers the modules', of others the parameters'.

    Each has ``delta_weight()`` (the dense update), ``merge()``, ``unmerge()``, ``merged``, ``enabled`` and
    ``evaluated()`` (D and G). A layer's is the adapted layer itself. ``model`` may be wrapped by DDP or its like.
    """
    model = unwrap(model)
    updates = {name: find_update(model, name) for name in bank_of(model).layers}
    return {name: update for name, update in updates.items() if update is not None}


def named_factors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name in the state dict, parameter) of every trainable factor, each once.

    ``model`` may be wrapped by DDP or its like; names are those of the model inside.
    """
    return bank_of(unwrap(model)).named_parameters("efft")


def prepare(model: nn.Module, args: Any) -> None:
    """Before a pass of the model: compose all factors together."""
    # A module-level function that finds the bank in its argument: copies and pickles of the model use their own.
    bank = bank_of(model)
    if bank.enabled:
        for factors in bank.banks():
            factors.prepare()
    elif (
        model.training
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and any(layer.merged for layer in adapted_layers(model).values())
    ):
        warnings.warn(
            "training a merged model: its factors get no gradient; call efft.unmerge(model) first", stacklevel=2
        )


def release(model: nn.Module, args: Any, output: Any) -> None:
    """After a pass: let go of what was composed, and tell once of layers that no pass reaches, and of dense weights."""
    bank = bank_of(model)
    idle = [binding for factors in bank.banks() for binding in factors.release()]
    if torch.compiler.is_compiling():
        return
    if bank.enabled and output is not None and bank.training not in bank._reads_checked:
        bank._reads_checked.add(bank.training)
        _tell_of_dense(bank, adapted_layers(model))
    if not idle or not bank.enabled or output is None or bank._idle_checked:
        return
    if any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in model.modules()):
        bank._idle_checked = True  # compiled blocks leave no trace of having run
        return
    names = _never_run(adapted_layers(model), idle)
    if names:
        bank._idle_checked = True
        warnings.warn(
            f"{len(names)} of {len(bank.layers)} adapted layers did not run in this pass, {names[0]!r} first, nor any "
            "like it in another block. That is as it should be if this input has nothing for them (a text without "
            "pictures); if no input has, exclude them",
            stacklevel=2,
        )


#: The part of the adapted weights that may be made dense in a pass without a word.
SILENT_DENSE = 0.01


def _tell_of_dense(bank: Bank, layers: Mapping[str, Update]) -> None:
    """Tell once of weights that modules read, so that every pass makes dense ones that include the update."""
    dense = {name: update for name, update in layers.items() if update.binding.dense}
    entries = sum(update.stored.numel() for update in dense.values())
    if entries <= SILENT_DENSE * sum(update.stored.numel() for update in layers.values()):
        return
    bank._reads_checked |= {False, True}
    size = sum(update.stored.numel() * update.stored.element_size() for update in dense.values())
    readers = {name: bank._readers.get(name) for name in dense}
    readers |= {name: type(u.module).__name__ for name, u in dense.items() if isinstance(u, AdaptedParameter)}
    known = ", ".join(sorted({reader for reader in readers.values() if reader})) or "the modules around them"
    warnings.warn(
        f"{len(dense)} of {len(layers)} adapted weights, {next(iter(dense))!r} first, are read by {known}, where no "
        f"call can be intercepted: every pass makes dense ones that include the update, {size / 2**20:.3g} MiB in all. "
        "The result is right; to save the time and memory, exclude these weights, or merge the update for inference",
        stacklevel=2,
    )


def _never_run(layers: Mapping[str, Update], idle: list[Any]) -> list[str]:
    """The layers that were passed by in every block alike: what reads their weights itself does so everywhere, whereas
    a block that is skipped at random (LayerDrop) runs at other places."""
    ran: dict[str, bool] = {}
    for name, layer in layers.items():
        place = re.sub(r"(?<=\.)\d+(?=\.)", "*", f".{name}.")
        ran[place] = ran.get(place, False) or layer.binding not in idle or not layer.enabled or layer.merged
    return [name for name in layers if not ran[re.sub(r"(?<=\.)\d+(?=\.)", "*", f".{name}.")]]


def base_loaded(model: nn.Module, incompatible: Any) -> None:
    """After a checkpoint without factors was loaded: its buffers are the base's."""
    bank = getattr(model, "efft", None)
    missing = [plain_name(name) for name in incompatible.missing_keys]
    if not isinstance(bank, Bank) or not all(_among(f"efft.{name}", missing) for name in bank.state_dict()):
        return
    loaded = buffers.snapshot(model, bank.head)
    bank._base_buffers.update({name: value for name, value in loaded.items() if not _among(name, missing)})


def _among(name: str, names: list[str]) -> bool:
    """Whether a name is among those of this model, or of a larger one around it."""
    return any(other == name or other.endswith(f".{name}") for other in names)
