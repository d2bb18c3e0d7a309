"""Measure quantized backbones under EFFT2: what rounding the frozen weights does to logits, time and memory.

    python -m benchmarks quantized --quick

The adapted layers are quantized by torchao. All rows are interleaved, have the same factors (in fp32) and see the same
images. ``error`` is ``|logits - dense| / |dense|`` over all images, where ``dense`` are the logits of the model in fp32
without quantization. The first row is that model in the measured dtype. The times are those of a forward pass for
inference, and of forward and backward in training.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.model.rows import adapted
from benchmarks.model.step import Setting
from benchmarks.options import parser_of_measurement
from benchmarks.timing import Samples, ratios, time_rows
from efft.adapting.inject import adapted_layers
from efft_lab.record import append, machine_facts, quantiles


@dataclass(frozen=True)
class QuantizedRow:
    """A way to store frozen weights; ``quantize`` converts one layer in place."""

    name: str
    explains: str
    quantize: Callable[[nn.Module], object] | None = None


def torchao(config: str, **options: Any) -> Callable[[nn.Module], None]:
    """Return a function that quantizes a layer by this configuration of torchao."""

    def quantize(layer: nn.Module) -> None:
        from torchao import quantization

        quantization.quantize_(layer, getattr(quantization, config)(**options))

    return quantize


def per_row_float8(layer: nn.Module) -> None:
    """Store weights and compute activations as e4m3 with a scale per row.

    The product is ``torch._scaled_mm`` if the GPU has it.
    """
    from torchao.quantization import PerRow

    torchao("Float8DynamicActivationFloat8WeightConfig", granularity=PerRow())(layer)


def nf4(layer: nn.Module) -> None:
    """Store weights in QLoRA's format: blocks of 64, with the scales of 256 blocks quantized together.

    If 256 does not divide the number of blocks, fewer scales are quantized together.
    """
    from torchao.quantization import to_nf4

    weight: Any = layer.weight
    scales = math.gcd(256, weight.numel() // 64)
    layer.weight = nn.Parameter(to_nf4(weight.detach(), 64, scales), requires_grad=False)


ROWS: dict[str, QuantizedRow] = {
    row.name: row
    for row in (
        QuantizedRow("dense", "not quantized"),
        QuantizedRow("int8", "int8 weights", torchao("Int8WeightOnlyConfig")),
        QuantizedRow("int8-dynamic", "int8 weights and activations", torchao("Int8DynamicActivationInt8WeightConfig")),
        QuantizedRow("fp8", "e4m3 weights", torchao("Float8WeightOnlyConfig")),
        QuantizedRow("fp8-dynamic", "e4m3 weights and activations", per_row_float8),
        QuantizedRow("nf4", "4-bit normal-float weights", nf4),
    )
}
_PHASES = ("fwd", "fwd_bwd")


def stored_bytes(tensor: Tensor) -> int:
    """Return the bytes that a tensor occupies; a subclass occupies what its parts do."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    return sum(stored_bytes(getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0])


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes that the frozen weights of the adapted layers occupy."""
    return sum(stored_bytes(layer.weight) for layer in adapted_layers(model).values())


def build(setting: Setting, row: QuantizedRow) -> nn.Module:
    """Return the model of ``row`` in the setting's dtype, with factors in fp32."""
    model = adapted(setting.plain().to(setting.device, getattr(torch, setting.dtype)), setting.rank)
    for layer in adapted_layers(model).values() if row.quantize else ():
        row.quantize(layer)
    return model


def passes(model: nn.Module, setting: Setting) -> dict[str, Callable[[], Tensor]]:
    """Return two calls: the logits of a batch for inference, and the loss of a training step after its backward."""
    images, labels = setting.examples(model)
    images = images.to(getattr(torch, setting.dtype))

    @torch.no_grad()
    def forward() -> Tensor:
        logits: Tensor = model.eval()(images)
        return logits

    def step() -> Tensor:
        model.zero_grad()
        loss = nn.functional.cross_entropy(model.train()(images).float(), labels)
        loss.backward()
        return loss

    return dict(zip(_PHASES, (forward, step), strict=True))


def measure(setting: Setting, rows: Sequence[QuantizedRow], repeats: int) -> list[dict[str, Any]]:
    """Return one line of the result file per row."""
    wide = replace(setting, dtype="float32")
    exact = passes(build(wide, ROWS["dense"]), wide)["fwd"]()
    common = {**machine_facts(), "suite": "quantized", **asdict(setting)}
    built: dict[str, dict[str, Callable[[], Tensor]]] = {}
    lines: dict[str, dict[str, Any]] = {}
    for row in rows:
        lines[row.name] = {**common, "row": row.name}
        try:
            model = build(setting, row)
            runs = passes(model, setting)
            logits = runs["fwd"]()
            runs["fwd_bwd"]()
        except (
            AssertionError,
            ImportError,
            RuntimeError,
        ) as error:  # such as a format that is not supported here; the other rows go on
            lines[row.name]["reason"] = f"failed: {error}"
            continue
        built[row.name] = runs
        error = (logits.float() - exact).norm() / exact.norm()
        lines[row.name] |= {"error": error.item(), "weight_bytes": weight_bytes(model)}
    samples: dict[str, Samples] = {
        phase: time_rows({name: of[phase] for name, of in built.items()}, repeats, device=setting.device)
        for phase in _PHASES
    }
    for name in built:
        lines[name]["seconds"] = {phase: quantiles(of[name]) for phase, of in samples.items()}
        lines[name]["ratio"] = {phase: quantiles(ratios(of, "dense")[name]) for phase, of in samples.items()}
    return list(lines.values())


def show(lines: Sequence[dict[str, Any]]) -> None:
    """Print the table of one setting."""
    first = lines[0]
    print(f"\n{first['model']}, batch {first['batch']}, rank {first['rank']}, {first['dtype']}, {first['device']}")
    print(f"{'weights':<13} {'MiB':>8} {'error':>9} {'inference ms':>13} {'/ dense':>8} {'step ms':>9} {'/ dense':>8}")
    for line in lines:
        if "reason" in line:
            print(f"{line['row']:<13} {line['reason']}")
            continue
        ms = [1e3 * line["seconds"][phase]["p50"] for phase in _PHASES]
        relative = [line["ratio"][phase]["p50"] for phase in _PHASES]
        print(
            f"{line['row']:<13} {line['weight_bytes'] / 2**20:>8.1f} {line['error']:>9.1e} {ms[0]:>13.2f} "
            f"{relative[0]:>8.3f} {ms[1]:>9.2f} {relative[1]:>8.3f}"
        )


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    options = parser_of_measurement("quantized", __doc__, ["bfloat16"])
    options.add_argument("--model", default=Setting.model, help="timm name; ViT or Swin")
    options.add_argument("--batch", type=int, help="images; default: 8, on a GPU 64")
    options.add_argument("--rank", type=int, default=Setting.rank)
    options.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    options.add_argument("--repeats", type=int, help="default: 20, with --quick 3")
    options.add_argument("--quick", action="store_true", help="few repeats")
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print and record every setting."""
    args = parser().parse_args(words)
    batch = args.batch or (8 if args.device == "cpu" else 64)
    rows = [row for row in ROWS.values() if row.name in {"dense", *args.rows}]
    for dtype in args.dtype:
        lines = measure(
            Setting(args.model, batch, args.rank, dtype, args.device), rows, args.repeats or (3 if args.quick else 20)
        )
        path = append("quantized", lines, args.results)
        show(lines)
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
