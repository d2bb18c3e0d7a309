"""Measure EFFT2 on quantized models: the effect of quantized frozen weights on logits, time and memory.

    python -m benchmarks quantized --quick

EFFT2 is the default variant of this library's method, in which the layers share the trained factors of their updates. A
row is one format of the frozen weights of the adapted layers. torchao quantizes these weights. The row ``dense`` is the
model without quantization in the measured dtype, and ratios divide the time of a row by the time of this row. All rows
have equal factors (in fp32) and get the same images. Every repetition measures all rows in turn.

The error of a row is ``|logits - exact| / |exact|`` over all images, where ``exact`` are the logits of the model in
fp32 without quantization. The command times a forward pass in eval mode ("inference"), and a forward and backward pass
in training mode without an optimizer ("step").
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
    """Describe a format of frozen weights.

    ``quantize`` is a function that converts the weight of one layer in place. If it is None, the weights keep the
    measured dtype.
    """

    name: str
    explains: str
    quantize: Callable[[nn.Module], object] | None = None


def torchao(config: str, **options: Any) -> Callable[[nn.Module], None]:
    """Return a function that quantizes a layer with the named configuration class of torchao."""

    def quantize(layer: nn.Module) -> None:
        from torchao import quantization

        quantization.quantize_(layer, getattr(quantization, config)(**options))

    return quantize


def per_row_float8(layer: nn.Module) -> None:
    """Quantize the weight of ``layer``, and its activations in every call, to e4m3 with one scale per row.

    The product uses ``torch._scaled_mm`` if the GPU supports it.
    """
    from torchao.quantization import PerRow

    torchao("Float8DynamicActivationFloat8WeightConfig", granularity=PerRow())(layer)


def nf4(layer: nn.Module) -> None:
    """Quantize the weight of ``layer`` to QLoRA's format: 4 bits per number, and one scale per block of 64 numbers.

    The scales are quantized in groups of 256 blocks. If 256 does not divide the number of blocks, the groups are
    smaller.
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
    """Return the bytes that a tensor occupies; for a tensor subclass, the sum over its parts."""
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
    """Return two functions of one batch: "fwd" returns the logits, "fwd_bwd" computes the loss and all gradients."""
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
    """Measure every row and return one line of the result file per row."""
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
        ) as error:  # such as an unsupported format; continue with the other rows
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
    options.add_argument("--batch", type=int, help="number of images; default: 8 on a CPU, 64 on a GPU")
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
    print(f"\nresults written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
