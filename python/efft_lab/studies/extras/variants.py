"""Define the settings of the study and create the initial parameters of their runs."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from efft_kernels.nn.initialization import MOVEMENT
from efft_lab.compare import suite as suites
from efft_lab.studies.stacked import Start
from efft_lab.train import TrainConfig
from efft_lab.train.methods import METHODS

#: The linear layers of a block.
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
#: The kinds of parameters that every setting trains.
OWN = ("sides", "cores", "lora_A", "lora_B", "own_A", "own_B", "head")
#: The kinds of parameters that a layer has only if a setting names them.
SPECIAL = ("diagonal_in", "diagonal_out", "gain")


@dataclass(frozen=True)
class Variant:
    """One setting.

    Attributes:
        name: name of the row.
        method: efft, fact_tt, peft_lora, linear (with ``rates``: only what these name is trained) or full.
        settings: fields of the method's configuration.
        lr: peak rate.
        rates: the rate of each kind of parameter, as a multiple of ``lr``. These kinds have 1 if they are not named:
            sides (or sides.U, sides.V), cores, lora_A, lora_B, own_A, own_B, head. These have 0: biases (or
            biases.qkv, .proj, .fc1, .fc2), norms (or norms.weight, norms.bias), gammas (of layer scales), diagonal_in
            and diagonal_out (of updates), gain (of the outputs of frozen layers). The method full trains everything.
        movement: movement of the automatic scale, see :data:`efft_kernels.nn.initialization.MOVEMENT`.
        own: rank of an additional update in LoRA's form, which each layer has beside the shared factors.
        start: "paper", or "orthogonal": sides have orthonormal columns and cores are orthogonal matrices, with the same
            norms.
        precondition: see :meth:`efft_lab.studies.stacked.Stack.preconditioned`.
        epochs: number of epochs of training.
    """

    name: str
    method: str = "efft"
    settings: Mapping[str, Any] = field(default_factory=dict)
    lr: float = 1e-3
    rates: Mapping[str, float] = field(default_factory=dict)
    movement: float = MOVEMENT
    own: int = 0
    start: str = "paper"
    precondition: bool = False
    epochs: int = 10

    def rate(self, kind: str) -> float:
        """Return the peak rate of a kind of parameter, or 0 if it is not trained."""
        family = kind.split(".")[0]
        default = 1.0 if self.method == "full" or family in OWN else 0.0
        return self.lr * self.rates.get(kind, self.rates.get(family, default))

    def structure(self) -> str:
        """Return a text that is equal for all variants whose runs can share a stack."""
        settings = {k: v for k, v in self.settings.items() if k not in ("alpha", "core_init", "init", "scale")}
        settings["dropout"] = bool(settings.get("dropout"))
        special = sorted(kind for kind in SPECIAL if kind in self.rates)
        return json.dumps([self.method, settings, special, self.own, self.precondition, self.epochs])

    def key(self) -> str:
        """Return a text that is equal for all variants whose runs have the same initial parameters."""
        special = sorted(kind for kind in SPECIAL if kind in self.rates)
        return json.dumps([self.method, self.settings, special, self.movement, self.own, self.start])


class Run(NamedTuple):
    """One run: a setting on a task; ``stage`` is explore, search or final."""

    variant: Variant
    task: str
    seed: int
    stage: str = "explore"


def kind_of(name: str, variant: Variant) -> str | None:
    """Return the kind of a parameter, or None if no run of the variant's structure trains it."""
    parent, _, last = name.rpartition(".")
    if name.startswith("head."):
        return "head"
    if name.startswith("efft."):
        return "cores" if last == "C" else f"sides.{last}"
    if last in OWN or last in SPECIAL:
        return last
    if "norm" in name:
        return f"norms.{last}"
    if last == "bias":
        return f"biases.{parent.rpartition('.')[2]}"
    if last == "gamma":
        return "gammas"
    return "weights" if variant.method == "full" else None


def recipe() -> dict[str, Any]:
    """Return the fields of the suite ``local_long``."""
    return dict(suites.load("local_long").train)


def config_of(variant: Variant, seed: int, fields: Mapping[str, Any]) -> TrainConfig:
    """Return the configuration for the ordinary trainer, without the extras."""
    values: dict[str, Any] = {**fields, "method": variant.method, "seed": seed, "lr": variant.lr}
    values |= {"epochs": variant.epochs, "protocol": "final"}
    if variant.method == "efft":
        values["efft"] = {**fields.get("efft", {}), "scale": "auto", **variant.settings}
    else:
        values.pop("efft", None)
        values["adapter"] = dict(variant.settings) or None
    return TrainConfig.from_dict(values)


def start_of(variant: Variant, seed: int, base: nn.Module, fields: Mapping[str, Any]) -> Start:
    """Return the initial parameters that the trainer would use, with the extras.

    Args:
        variant: the setting.
        seed: the seed of the run.
        base: the pretrained model, with any classifier; a copy is adapted.
        fields: fields of :class:`~efft_lab.train.TrainConfig`.
    """
    from accelerate.utils import set_seed

    model: Any = copy.deepcopy(base)
    set_seed(seed)
    config = config_of(variant, seed, fields)
    METHODS[config.method].apply(model.train(), config.settings())
    start = Start.of(model)
    start.parameters.update(
        {n: p.detach() for n, p in base.named_parameters()}
    )  # runs share one copy of the parameters that no run changes
    generator = torch.Generator().manual_seed(seed)
    if variant.method == "efft":
        for name in model.efft:
            if "scale" not in variant.settings:
                start.scales[name] *= variant.movement / MOVEMENT
            for factor in "UCV" if variant.start == "orthogonal" else "":
                value = start.parameters[f"efft.{name}.{factor}"]
                if value.any():
                    start.parameters[f"efft.{name}.{factor}"] = _orthogonal(value, generator)
    for name, weight in list(start.parameters.items()):
        layer = name.removesuffix(".weight")
        if not layer.endswith(LAYERS) or layer == name:
            continue
        d_out, d_in = weight.shape
        for kind, d in (("diagonal_in", d_in), ("diagonal_out", d_out), ("gain", d_out)):
            if kind in variant.rates:
                start.parameters[f"{layer}.{kind}"] = torch.ones(d)
        if variant.own:  # same initial values as in peft
            bound = d_in**-0.5
            drawn = torch.rand(variant.own, d_in, generator=generator)
            start.parameters[f"{layer}.own_A"] = drawn * 2 * bound - bound
            start.parameters[f"{layer}.own_B"] = torch.zeros(d_out, variant.own)
    return start


def _orthogonal(value: Tensor, generator: torch.Generator) -> Tensor:
    """Return a matrix, or a batch, with orthonormal columns (or rows) at the norm of ``value``."""
    drawn = torch.randn(value.shape, generator=generator)
    wide = drawn.shape[-1] > drawn.shape[-2]
    q = torch.linalg.qr(drawn.mT if wide else drawn)[0]
    q = q.mT if wide else q
    return q.contiguous() * (value.norm() / q.norm())
