"""Define the rows of the command ``model``: ways to turn a plain timm model into a model to train.

EFFT2 is the default variant of this library's method. The update of a weight matrix is dW = s U C V. The layers share
the factors U and V, each matrix has its own core C, and s is a number. The head of a model is its classifier, which all
rows train. "The paper" is the paper that introduced EFFT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import efft
from efft.adapting.heads import find_head
from efft.adapting.inject import adapted_layers, adapter_of
from efft.hints import did_you_mean
from efft.planning.targets import find_targets
from efft_kernels import Backend, EfftLinear, use_backend
from efft_kernels.testing import backends


@dataclass(frozen=True)
class ModelRow:
    """Describe one way to adapt a model.

    Attributes:
        name: name of the row in tables and result files.
        explains: description in one line.
        adapt: function from (plain model, rank) to the model to train, in which only the parameters that the row trains
            require gradients.
        is_efft: whether the row computes the EFFT update; all such rows have equal factors.
        backend: the backend of this library's ops, or None if the row does not use these ops.
    """

    name: str
    explains: str
    adapt: Callable[[nn.Module, int], nn.Module]
    is_efft: bool = False
    backend: Backend | None = None

    def running(self) -> AbstractContextManager[None]:
        """Return the context in which the model of this row must run."""
        return nullcontext() if self.backend is None else use_backend(self.backend)


class DenseDelta(nn.Module):
    """Compute a layer with a dense update, as ``x (W + dW)ᵀ`` (form "naive") or ``x Wᵀ + s x dW`` (form "paper").

    ``layer`` is the adapted layer whose weight, bias and factors are used.
    """

    def __init__(self, layer: EfftLinear, form: str) -> None:
        super().__init__()
        if layer.site.columns is not None:
            raise ValueError(
                f"DenseDelta needs a layer that uses all columns of V, got {layer.site}: use variant='efft2'"
            )
        self.layer, self.form = layer, form

    def forward(self, x: Tensor) -> Tensor:
        layer, site = self.layer, self.layer.site
        U, V, C = layer.factors.U, layer.factors.V, layer.factors.C[site.layer]
        deltas = [U @ C[core] @ V for core in site.cores]  # [d_in, d_out] each
        if site.transpose:
            deltas = [delta.t() for delta in deltas]
        s = float(layer.factors.scale)
        if self.form == "naive":
            return F.linear(x, layer.weight + s * torch.cat(deltas, dim=1).t(), layer.bias)
        return F.linear(x, layer.weight, layer.bias) + s * torch.cat([x @ delta for delta in deltas], dim=-1)


def targeted(model: nn.Module) -> list[str]:
    """Return the names of the layers that the EFFT2 and LoRA rows adapt, in the order of the forward pass."""
    return [target.name for target in find_targets(model, find_head(model, None))]


def floor(model: nn.Module, rank: int) -> nn.Module:
    """Return the frozen baseline, a model that trains only its head. Every method costs at least as much.

    As in the models with adapters, the gradient flows from the head to the output of the first layer that adapters
    would adapt. The gradient ends there, because no adapter needs the gradient with respect to that layer's input.
    """
    efft.freeze_backbone(model)
    model.get_submodule(targeted(model)[0]).register_forward_hook(lambda module, args, y: y.requires_grad_())
    return model


def adapted(model: nn.Module, rank: int, bias: Literal["none", "auto"] = "none") -> nn.Module:
    """Return the model adapted by this library with EFFT2.

    Factors that are zero get random values. With zero factors, half of the gradients would be zero, and the check in
    ``gate.py`` could not find errors in them.
    """
    efft.apply(model, efft.EfftConfig(rank=rank, dropout=0.0, bias=bias))
    for _, factor in efft.named_factors(model):
        if not factor.any():
            nn.init.normal_(factor, std=0.02)
    return model


def with_biases(model: nn.Module, rank: int) -> nn.Module:
    """Return the model adapted by this library with EFFT2, and with the biases that ``EfftConfig.auto`` trains."""
    return adapted(model, rank, bias="auto")


def fused(model: nn.Module, rank: int) -> nn.Module:
    """Return the model adapted by this library with EFFT2, after ``efft.fuse``.

    The adapted layers then also compute the layer norms and GELUs that precede them.
    """
    efft.fuse(adapted(model, rank))
    return model


def dense(form: str) -> Callable[[nn.Module, int], nn.Module]:
    """Return a function that adapts a model with :class:`DenseDelta` layers of the given form.

    The factors are equal to those of :func:`adapted`.
    """

    def adapt(model: nn.Module, rank: int) -> nn.Module:
        for name, layer in adapted_layers(adapted(model, rank)).items():
            model.set_submodule(name, DenseDelta(layer, form))
        adapter_of(model).enabled = False  # skips the contraction C V of all layers, which the dense forms do not use
        return model

    return adapt


def lora(model: nn.Module, rank: int) -> nn.Module:
    """Return the model adapted by the peft library: LoRA on the same layers as EFFT2, and a trained head.

    peft casts every input to the dtype of the adapter. This cast is disabled here, because under autocast its only
    effect is a copy.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targeted(model), modules_to_save=find_head(model, None))
    model = get_peft_model(model, config)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
    return model


def bitfit(model: nn.Module, rank: int) -> nn.Module:
    """Return the model with all biases and the head trained; ``rank`` is ignored."""
    efft.freeze_backbone(model)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_()
    return model


def full(model: nn.Module, rank: int) -> nn.Module:
    """Return the model with all parameters trained; ``rank`` is ignored."""
    return model.requires_grad_()


FLOOR = ModelRow("floor", "frozen model; the gradient flows from the head to the first layer that has adapters", floor)
NAIVE = ModelRow("naive", "EFFT2, every update is added to its weight: x (W + dW)ᵀ", dense("naive"), is_efft=True)
PAPER = ModelRow("paper", "EFFT2 as the paper's code does it: x Wᵀ + s [x dW ...]", dense("paper"), is_efft=True)

ROWS: dict[str, ModelRow] = {
    row.name: row
    for row in (
        FLOOR,
        *(
            ModelRow(f"efft:{b.value}", f"EFFT2 by this library, backend {b.value}", adapted, is_efft=True, backend=b)
            for b in (Backend.AUTO, *backends())
        ),
        *(
            ModelRow(f"fused:{b.value}", f"EFFT2 after efft.fuse, backend {b.value}", fused, is_efft=True, backend=b)
            for b in (Backend.AUTO, *backends())
            if b is not Backend.REFERENCE
        ),
        ModelRow("biases:auto", "EFFT2 with trained biases", with_biases, is_efft=True, backend=Backend.AUTO),
        NAIVE,
        PAPER,
        ModelRow("peft", "LoRA of the peft library, same rank, same layers, without its cast of the input", lora),
        ModelRow("bitfit", "only the biases and the head are trained", bitfit),
        ModelRow("full", "full fine-tuning", full),
    )
}


def select(names: Iterable[str] | None) -> list[ModelRow]:
    """Return the rows with these names, or all rows for None, in the order of the tables.

    The frozen baseline is always included, and comes first.

    Raises:
        ValueError: a name is unknown.
    """
    wanted = set(ROWS if names is None else names)
    for name in sorted(wanted - set(ROWS)):
        raise ValueError(f"unknown row {name!r}: {did_you_mean(name, ROWS)}")
    return [row for row in ROWS.values() if row.name in wanted | {"floor"}]
