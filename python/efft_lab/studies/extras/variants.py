"""Define the settings (variants) of the study and create the initial parameters of their runs.

Extras are trained parameters other than the factors of a method and the head, such as biases and norms.
"""

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
#: The kinds of parameters that a setting trains by default.
OWN = ("sides", "cores", "lora_A", "lora_B", "own_A", "own_B", "head")
#: The kinds of parameters that layers have only if the ``rates`` of a setting name them.
SPECIAL = ("diagonal_in", "diagonal_out", "gain")


@dataclass(frozen=True)
class Variant:
    """One setting.

    Attributes:
        name: name of the setting in result files.
        method: "efft", "fact_tt", "peft_lora", "linear" (trains only the head and the kinds in ``rates``) or "full"
            (trains everything).
        settings: fields of the method's configuration.
        lr: peak learning rate, the base rate.
        rates: maps kinds of parameters to their learning rates as multiples of ``lr``. The following kinds have the
            multiple 1 by default: sides (U and V; or only sides.U or sides.V), cores, lora_A, lora_B, own_A, own_B and
            head. The following kinds are trained only if they are named: biases (or only biases.qkv, biases.proj,
            biases.fc1 or biases.fc2), norms (or only norms.weight or norms.bias), gammas (of layer scales),
            diagonal_in and diagonal_out (diagonal factors of the updates), and gain (factors of the outputs of frozen
            layers).
        movement: movement of the automatic scale, see :data:`efft_kernels.nn.initialization.MOVEMENT`.
        own: rank of an additional update that is not shared: each layer has its own matrices own_A and own_B as in
            LoRA.
        start: initial values of EFFT's factors. "paper": as in the paper. "orthogonal": all factors that are not zero
            are replaced by matrices with orthonormal columns or rows, scaled to the same norm.
        precondition: whether gradients are preconditioned, see
            :func:`efft_lab.studies.stacked.precondition.preconditioned`.
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
        """Return the peak learning rate of a kind of parameter, or 0 if this kind is not trained."""
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
    """A training of one setting on one task with one seed. ``stage`` is "explore", "search" or "final"."""

    variant: Variant
    task: str
    seed: int
    stage: str = "explore"


def kind_of(name: str, variant: Variant) -> str | None:
    """Return the kind of a parameter, or None if the method of the variant cannot train the parameter."""
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
    """Return the fields of ``TrainConfig`` that all runs of the suite ``local_long`` share."""
    return dict(suites.load("local_long").train)


def config_of(variant: Variant, seed: int, fields: Mapping[str, Any]) -> TrainConfig:
    """Return the configuration of a run for :func:`efft_lab.train.run`, which ignores the extras."""
    values: dict[str, Any] = {**fields, "method": variant.method, "seed": seed, "lr": variant.lr}
    values |= {"epochs": variant.epochs, "protocol": "final"}
    if variant.method == "efft":
        values["efft"] = {**fields.get("efft", {}), "scale": "auto", **variant.settings}
    else:
        values.pop("efft", None)
        values["adapter"] = dict(variant.settings) or None
    return TrainConfig.from_dict(values)


def start_of(variant: Variant, seed: int, base: nn.Module, fields: Mapping[str, Any]) -> Start:
    """Return the initial parameters that :func:`efft_lab.train.run` would use, and those of the extras.

    Args:
        variant: the setting.
        seed: the seed of the run.
        base: the pretrained model, with any classifier. It is not changed.
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
    )  # all runs then share the memory of parameters that they do not train
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
        if variant.own:  # the initial values have the same distribution as in peft
            bound = d_in**-0.5
            drawn = torch.rand(variant.own, d_in, generator=generator)
            start.parameters[f"{layer}.own_A"] = drawn * 2 * bound - bound
            start.parameters[f"{layer}.own_B"] = torch.zeros(d_out, variant.own)
    return start


def _orthogonal(value: Tensor, generator: torch.Generator) -> Tensor:
    """Return random matrices that have orthogonal columns or rows, and the shape and the norm of ``value``.

    The columns are orthogonal if there are at most as many columns as rows. Otherwise, the rows are orthogonal.
    """
    drawn = torch.randn(value.shape, generator=generator)
    wide = drawn.shape[-1] > drawn.shape[-2]
    q = torch.linalg.qr(drawn.mT if wide else drawn)[0]
    q = q.mT if wide else q
    return q.contiguous() * (value.norm() / q.norm())
