"""Study the accuracy of EFFT if the frozen products are computed in 8-bit floating-point formats (fp8).

    OMP_NUM_THREADS=1 python -m benchmarks fp8

No kernel of this library computes such products. The study emulates a kernel for GPUs: it rounds the operands of the
frozen products to fp8 and sums the products of the rounded values in fp32. It trains ``EfftConfig.auto()`` with the
recipe, the tasks and the seeds of the suite ``twelve``. The accuracies can therefore be compared with the runs of that
suite in bf16 ("EFFT, auto" in ``compare_twelve.jsonl``).

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
import functools
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
from efft_lab import record
from efft_lab.compare import suite as suites
from efft_lab.compare import worker
from efft_lab.compare.agenda import Agenda
from efft_lab.studies.side_by_side import method
from efft_lab.train import TrainConfig, build
from efft_lab.train.methods import METHODS, Efft, Method

SUITE, METHOD = "twelve", "EFFT, auto"
BATCH = 64
"""Number of images for the errors before training."""


class Setting(NamedTuple):
    """Describe how the operands of the frozen products are rounded.

    Attributes:
        x: format of ``x`` and ``W`` in the forward pass.
        gy: format of ``gy`` in the backward pass, in which the format of ``W`` is that of the forward pass. With None,
            the backward pass does not round ``gy`` and uses the rounded weight of the forward pass.
        rows: whether each row has a scale. If False, each tensor has one scale.
    """

    x: torch.dtype
    gy: torch.dtype | None
    rows: bool = True


_E4M3, _E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
#: The settings by name. ``bf16`` is the model with the kernels of this library, without fp8. ``forward`` rounds like
#: torchao's Float8DynamicActivationFloat8WeightConfig, which this library supports: the backward pass does not round
#: ``gy`` and multiplies by the dequantized weight.
SETTINGS: dict[str, Setting | None] = {
    "bf16": None,
    "e4m3": Setting(_E4M3, _E4M3),
    "e5m2": Setting(_E4M3, _E5M2),
    "tensor": Setting(_E4M3, _E5M2, rows=False),
    "forward": Setting(_E4M3, None),
}


class Rounded(NamedTuple):
    """Represent a matrix ``[n, k]`` as numbers of an fp8 format, with scales.

    Attributes:
        numbers: the numbers in bf16, which represents them exactly, ``[n, k]``.
        scale: the scales in fp32, ``[n, 1]`` or ``[1, 1]``.
    """

    numbers: Tensor
    scale: Tensor

    @classmethod
    def of(cls, values: Tensor, dtype: torch.dtype, rows: bool) -> Rounded:
        """Round ``values`` ``[n, k]`` to an fp8 format, with one scale per row or one scale for the whole matrix."""
        wide = values.float()
        largest = wide.abs().amax(1 if rows else (0, 1), keepdim=True)
        scale = largest.clamp_min(torch.finfo(torch.float32).tiny) / torch.finfo(dtype).max
        # A quotient may be above the largest number of the format by a rounding error. The cast then rounds it down.
        codes = (wide / scale).to(dtype).view(torch.uint8)
        numbers = _numbers_of(dtype).index_select(0, codes.flatten().int())
        return cls(numbers.view(codes.shape), scale)

    def dense(self) -> Tensor:
        """Return the represented matrix in fp32."""
        return self.numbers.float() * self.scale

    def times(self, other: Rounded) -> Tensor:
        """Return the product with the transpose of ``other`` ``[m, k]``, in fp32, ``[n, m]``.

        The products of numbers are summed in fp32. The sums are rounded to bf16 before they are scaled, because the
        CPU multiplies much faster in bf16 than in fp32. This error is small compared with that of the operands.
        """
        return (self.numbers @ other.numbers.T).float() * self.scale * other.scale.T


@functools.cache
def _numbers_of(dtype: torch.dtype) -> Tensor:
    """Return the numbers of all 256 codes of an fp8 format, in bf16. A look-up takes less time than torch's cast."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).bfloat16()


class Weights(NamedTuple):
    """Hold the rounded weight of a layer, once for each frozen product.

    Attributes:
        forward: ``W`` ``[d_out, d_in]``, for ``x Wᵀ``.
        backward: ``Wᵀ`` ``[d_in, d_out]``, for ``gy W``.
    """

    forward: Rounded
    backward: Rounded

    @classmethod
    def of(cls, W: Tensor, setting: Setting) -> Weights:
        """Round ``W`` ``[d_out, d_in]``."""
        W = W.detach()
        forward = Rounded.of(W, setting.x, setting.rows)
        if setting.gy is None:
            return cls(forward, _unrounded(forward.dense().T.contiguous()))
        return cls(forward, Rounded.of(W.T, setting.x, setting.rows))


def _unrounded(values: Tensor) -> Rounded:
    return Rounded(values.bfloat16(), torch.ones(1, 1))


class Product(torch.autograd.Function):
    """Compute an adapted layer ``x Wᵀ + b + (x D) G`` ``[tokens, d_out]`` with frozen products in fp8.

    ``x`` ``[tokens, d_in]`` is in bf16. ``D`` ``[d_in, r]``, ``G`` ``[r, d_out]`` and ``b`` ``[d_out]`` (or None) are
    in fp32, and so are their gradients. The products with ``D`` and ``G`` round these factors, ``h`` and ``dh`` to
    bf16, and sum in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Weights, b: Tensor | None, D: Tensor, G: Tensor, setting: Setting
    ) -> Tensor:
        h = x @ D.bfloat16()
        y = Rounded.of(x, setting.x, setting.rows).times(weights.forward) + h.float() @ G.bfloat16().float()
        ctx.save_for_backward(x, h, D, G)
        ctx.weights, ctx.setting = weights, setting
        return (y if b is None else y + b).bfloat16()

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, D, G = ctx.saved_tensors
        setting: Setting = ctx.setting
        need_dx, _, need_db, *_ = ctx.needs_input_grad
        dx = None
        with torch.autocast(gy.device.type, enabled=False):
            dh = gy @ G.T.bfloat16()
            if need_dx:
                operand = _unrounded(gy) if setting.gy is None else Rounded.of(gy, setting.gy, setting.rows)
                dx = (operand.times(ctx.weights.backward) + dh.float() @ D.T.bfloat16().float()).bfloat16()
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

    def forward(self, x: Tensor) -> Tensor:  # [..., d_in] -> [..., d_out] in bf16
        D, G = self.factors.down_up(self.binding)
        with torch.autocast(x.device.type, enabled=False):
            rows = x.bfloat16().reshape(-1, x.shape[-1])
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
    kept = ("test_accuracy", "train_loss", "trainable_parameters", "head_parameters", "cpu_seconds", "failed")
    # The accuracy of a run that diverged counts as 0.
    return {**before, "test_accuracy": 0.0, **{field: result[field] for field in kept if field in result}}


def finished(results: Path | None) -> set[tuple[str, str, int]]:
    """Return the setting, the task and the seed of each training run in ``fp8.jsonl``."""
    path = (results or record.RESULTS) / "fp8.jsonl"
    rows = record.read(path) if path.exists() else []
    return {(row["setting"], row["task"], row["seed"]) for row in rows if "test_accuracy" in row}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and append to ``fp8.jsonl``. Training runs that the file already contains are skipped.

    Therefore several processes can share the work, if they begin with different tasks or seeds.
    """
    suite = suites.load(SUITE)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks fp8", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=["e4m3"])
    parser.add_argument("--tasks", nargs="+", choices=list(suite.tasks), default=list(suite.tasks))
    parser.add_argument("--seeds", nargs="+", type=int, choices=suite.seeds, default=[0, 1])
    parser.add_argument("--errors", action="store_true", help="measure only the errors before training")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="folder for fp8.jsonl")
    args = parser.parse_args(arguments)
    worker.choose_attention()
    for seed, task, name in product(args.seeds, args.tasks, args.settings):
        if not args.errors and (name, task, seed) in finished(args.results):
            continue
        fields = configuration(task, seed)
        found = errors(TrainConfig.from_dict(fields), name) if args.errors else study(name, fields)
        row = {"setting": name, "task": task, "seed": seed, **found, **record.machine_facts()}
        record.append("fp8", [row], args.results)
        text = ", ".join(f"{field} {value}" for field, value in found.items())
        print(f"{task:<20} seed {seed} {name:<8} {text}", flush=True)
    return 0
