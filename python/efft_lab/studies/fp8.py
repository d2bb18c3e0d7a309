"""Study the accuracy of EFFT if the frozen products are computed in 8-bit floating-point formats (fp8).

    OMP_NUM_THREADS=1 python -m benchmarks fp8

No kernel of this library computes such products. The study emulates a kernel for GPUs: it rounds the operands of the
frozen products to fp8 and multiplies the rounded values in fp32. It trains ``EfftConfig.auto()`` with the recipe, the
tasks and the seeds of the suite ``twelve``. The accuracies can therefore be compared with the runs of that suite in
bf16 ("EFFT, auto" in ``compare_twelve.jsonl``).

A layer computes ``y = x Wᵀ + b + h G`` with ``h = x D`` in the forward pass, and ``dx = gy W + dh Dᵀ`` with
``dh = gy Gᵀ`` in the backward pass. ``W`` is the frozen weight, ``gy`` the gradient with respect to ``y``, and ``D``
and ``G`` are the factors of the update. ``x Wᵀ`` and ``gy W`` are the frozen products. Only their operands are rounded
to fp8. All terms with ``D`` and ``G``, and the gradients of the trained parameters, use ``x`` and ``gy`` in bf16.

A rounded operand is stored as a tensor in fp8 and fp32 scales. A scale maps the largest absolute value of a group of
entries to the largest number of the format. In most settings, each row that is multiplied by a row of the other operand
is one group: a token of ``x`` or ``gy``, a row of ``W`` in the forward pass, and a column of ``W`` in the backward
pass. In the setting ``tensor``, the whole tensor is one group. ``W`` does not change, and is rounded only once.
``x`` and ``gy`` are rounded with new scales in every pass. The formats are e4m3 (4 bits for the exponent and 3 for the
mantissa) and e5m2. See :data:`SETTINGS` for the settings.

Before the training, the study measures errors on one batch of training images: ``|a - b| / |b|``, where ``b`` are the
logits (or the gradients of all trained parameters) of the model in fp32, and ``a`` are those of the setting.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import efft
from efft.adapting.adapter import adapted_layers
from efft.config import AdapterConfig
from efft_kernels import EfftLinear
from efft_lab.compare import suite as suites
from efft_lab.compare import worker
from efft_lab.compare.agenda import Agenda
from efft_lab.record import append, machine_facts
from efft_lab.studies.side_by_side import method
from efft_lab.train import TrainConfig, build
from efft_lab.train.methods import METHODS, Efft, Method

SUITE, METHOD = "twelve", "EFFT, auto"
BATCH = 64
"""Number of images for the errors before training."""


class Setting(NamedTuple):
    """Describe how the operands of the frozen products are rounded.

    Attributes:
        explains: description for the table.
        x: format of ``x`` and ``W`` in the forward pass.
        gy: format of ``gy`` in the backward pass, in which the format of ``W`` is that of the forward pass. With None,
            the backward pass does not round ``gy`` and uses the rounded weight of the forward pass.
        rows: whether each row has a scale. If False, each tensor has one scale.
    """

    explains: str
    x: torch.dtype
    gy: torch.dtype | None
    rows: bool = True


_E4M3, _E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
#: The settings by name. ``bf16`` is the model with the kernels of this library, without fp8.
SETTINGS: dict[str, Setting | None] = {
    "bf16": None,
    "e4m3": Setting("all operands in e4m3, one scale per row", _E4M3, _E4M3),
    "e5m2": Setting("`gy` in e5m2, all other operands in e4m3, one scale per row", _E4M3, _E5M2),
    "tensor": Setting("`gy` in e5m2, all other operands in e4m3, one scale per tensor", _E4M3, _E5M2, False),
    # With torchao's Float8DynamicActivationFloat8WeightConfig, the layers of this library compute such products.
    "forward": Setting("`gy` in bf16, all other operands in e4m3, one scale per row", _E4M3, None),
}


def rounded(values: Tensor, dtype: torch.dtype, rows: bool) -> Tensor:
    """Round to an fp8 format with computed scales, and return the represented values.

    Args:
        values: matrix ``[n, k]``.
        dtype: the fp8 format.
        rows: whether each row has a scale, instead of the whole matrix.

    Returns:
        The values in fp32, ``[n, k]``.
    """
    wide = values.float()
    largest = wide.abs().amax(1, keepdim=True) if rows else wide.abs().amax()
    scale = largest.clamp_min(torch.finfo(torch.float32).tiny) / torch.finfo(dtype).max
    # A value that rounding has put above the largest number would become NaN.
    limited = (wide / scale).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return limited.to(dtype).float() * scale


class Weights(NamedTuple):
    """Hold the rounded weight of a layer, once for each frozen product.

    Attributes:
        forward: the weight for ``x Wᵀ``, fp32 ``[d_out, d_in]``.
        backward: the weight for ``gy W``, fp32 ``[d_out, d_in]``.
    """

    forward: Tensor
    backward: Tensor

    @classmethod
    def of(cls, W: Tensor, setting: Setting) -> Weights:
        """Round ``W`` ``[d_out, d_in]``."""
        W = W.detach()
        forward = rounded(W, setting.x, setting.rows)
        if setting.gy is None:
            return cls(forward, forward)
        return cls(forward, rounded(W.T, setting.x, setting.rows).T.contiguous())


class Product(torch.autograd.Function):
    """Compute an adapted layer ``x Wᵀ + b + (x D) G`` ``[tokens, d_out]`` with frozen products in fp8.

    The dtype of ``x`` ``[tokens, d_in]`` is that of the activations. ``D`` ``[d_in, r]``, ``G`` ``[r, d_out]`` and
    ``b`` ``[d_out]`` (or None) are in fp32, and so are their gradients. ``h`` and ``dh`` are rounded to the dtype of
    the activations. Every output is the rounded result of a sum in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Weights, b: Tensor | None, D: Tensor, G: Tensor, setting: Setting
    ) -> Tensor:
        dtype = x.dtype
        h = x @ D.to(dtype)
        y = rounded(x, setting.x, setting.rows) @ weights.forward.T + h.float() @ G.to(dtype).float()
        ctx.save_for_backward(x, h, D, G)
        ctx.weights, ctx.setting = weights, setting
        return (y if b is None else y + b).to(dtype)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, D, G = ctx.saved_tensors
        setting: Setting = ctx.setting
        need_dx, _, need_db, *_ = ctx.needs_input_grad
        dtype, dx = gy.dtype, None
        with torch.autocast(gy.device.type, enabled=False):
            dh = gy @ G.T.to(dtype)
            if need_dx:
                operand = gy.float() if setting.gy is None else rounded(gy, setting.gy, setting.rows)
                dx = (operand @ ctx.weights.backward + dh.float() @ D.T.to(dtype).float()).to(dtype)
            dD, dG = x.T.float() @ dh.float(), h.T.float() @ gy.float()
            db = gy.float().sum(0) if need_db else None
        return dx, None, db, dD, dG, None


class Fp8Linear(EfftLinear):
    """Compute an :class:`efft_kernels.EfftLinear` with :class:`Product`.

    Attributes:
        setting: how the operands are rounded.
        weights: the rounded weight.
    """

    setting: Setting
    weights: Weights

    def forward(self, x: Tensor) -> Tensor:  # [..., d_in] -> [..., d_out]
        D, G = self.factors.down_up(self.binding)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        with torch.autocast(x.device.type, enabled=False):
            rows = x.to(dtype).reshape(-1, x.shape[-1])
            b = None if self.bias is None else self.bias.float()
            y: Tensor = Product.apply(rows, self.weights, b, D.float(), G.float(), self.setting)
        return y.reshape(*x.shape[:-1], -1)


def round_layers(model: nn.Module, setting: Setting) -> None:
    """Make every adapted layer of ``model`` a :class:`Fp8Linear`, in place.

    Raises:
        TypeError: an adapted layer is not an :class:`efft_kernels.EfftLinear`.
    """
    for name, layer in adapted_layers(model).items():
        if type(layer) is not EfftLinear:
            raise TypeError(f"{name}: expected an EfftLinear, got {type(layer).__name__}")
        layer.__class__ = Fp8Linear
        rounding: Any = layer
        rounding.setting, rounding.weights = setting, Weights.of(layer.stored, setting)


class Fp8(Efft):
    """Train EFFT with frozen products in fp8."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.setting = setting

    def apply(self, model: nn.Module, settings: AdapterConfig) -> None:
        # Norms and GELUs are not fused into the adapted layers, because these would then compute the fused op.
        efft.apply(model, settings)
        round_layers(model, self.setting)


def method_of(name: str) -> Method:
    """Return the training method for one of :data:`SETTINGS`."""
    setting = SETTINGS[name]
    return METHODS["efft"] if setting is None else Fp8(setting)


def errors(config: TrainConfig, name: str) -> dict[str, float]:
    """Return the relative errors of logits and gradients before training, for one of :data:`SETTINGS`."""
    task = build.load_task(config)
    images, labels = next(iter(torch.utils.data.DataLoader(task.trainval, batch_size=BATCH)))

    def logits_and_gradients(of: Method, autocast: bool) -> tuple[Tensor, Tensor]:
        model = build.create_model(config, task.classes)
        torch.manual_seed(config.seed)  # for equal factors
        of.apply(model, config.settings())
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits: Tensor = model.train()(images)
        functional.cross_entropy(logits.float(), labels).backward()
        found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return logits.detach().float(), torch.cat(found)

    exact = logits_and_gradients(METHODS["efft"], False)
    found = logits_and_gradients(method_of(name), True)
    return {
        f"{what}_error": float((a - b).norm() / b.norm())
        for what, a, b in zip(("logits", "gradients"), found, exact, strict=True)
    }


def configuration(task: str, seed: int) -> dict[str, Any]:
    """Return the fields of ``TrainConfig`` for the run of the suite."""
    agenda = Agenda(suites.load(SUITE), [METHOD])
    return next(run.config for run in agenda.finals(task, METHOD, {}) if run.seed == seed)


def study(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Train one model, and return the errors and the result of the run for the result file."""
    before = errors(TrainConfig.from_dict(dict(fields)), name)
    with method("efft", method_of(name)):
        result = worker.execute("final", dict(fields))
    kept = ("test_accuracy", "train_loss", "trainable_parameters", "head_parameters", "seconds", "failed")
    return {**before, **{field: result[field] for field in kept if field in result}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and append to ``fp8.jsonl``."""
    suite = suites.load(SUITE)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks fp8", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=["e4m3"])
    parser.add_argument("--tasks", nargs="+", choices=list(suite.tasks), default=list(suite.tasks))
    parser.add_argument("--seeds", nargs="+", type=int, choices=suite.seeds, default=[0, 1])
    parser.add_argument("--errors", action="store_true", help="only print the errors before training")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="folder for fp8.jsonl")
    args = parser.parse_args(arguments)
    worker.choose_attention()
    for seed, task, name in product(args.seeds, args.tasks, args.settings):
        fields = configuration(task, seed)
        if args.errors:
            found = errors(TrainConfig.from_dict(fields), name)
        else:
            found = study(name, fields)
            row = {"setting": name, "task": task, "seed": seed, **found}
            append("fp8", [{**row, **machine_facts()}], args.results)
        text = ", ".join(
            f"{field} {value:.2e}" if "error" in field else f"{field} {value}" for field, value in found.items()
        )
        print(f"{task:<20} seed {seed} {name:<8} {text}", flush=True)
    return 0
