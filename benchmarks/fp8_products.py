"""Compare the time of fp8 products with that of bf16 products, for the frozen products of a ViT-B block.

    python -m benchmarks fp8-products                     # on a GPU of compute capability 8.9 or higher
    python -m benchmarks fp8-products --quick --device cpu  # only checks that the command runs

A ViT-B block has four linear layers, qkv, o, fc1 and fc2. With a frozen weight W, a layer computes x Wᵀ in the forward
pass and gy W in the backward pass, where gy is the gradient of its output. These are the eight products of the block.
A row is one way to compute a product. The row ``bf16`` is the reference of the ratios. The other rows use
``torch._scaled_mm`` with both operands in e4m3. They differ in the number of scales, and in whether the GPU may
accumulate with fewer bits ("fast accumulation"). The rounding of the operands is not part of the times.

The last line of the output is the sum of the medians over the eight products, divided by the sum in bf16. A kernel for
adapted layers with frozen weights in fp8 is worthwhile only if this ratio is small enough (see the section "Frozen
products in fp8" of docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.options import default_device, parser_of
from benchmarks.steps import LAYERS, PASSES, TOKENS
from benchmarks.timing import Samples, ratios, time_rows
from efft_lab.record import append, machine_facts, quantiles

#: For each row: whether each row of an operand has a scale (otherwise, the operand has one), and whether the product
#: uses fast accumulation.
FP8 = {"fp8": (True, True), "fp8-slow": (True, False), "fp8-tensor": (False, True)}
#: The largest relative error of a product that is accepted. Rounding both operands to e4m3 causes an error of 0.04.
_LARGEST_ERROR = 0.1
_QUICK_TOKENS = 32
_FORMAT = torch.float8_e4m3fn


def scaled(values: Tensor, rows: bool) -> tuple[Tensor, Tensor]:
    """Round ``values`` ``[n, k]`` to e4m3, and return the fp8 tensor and its scales.

    The scales are ``[n, 1]`` with ``rows``, and ``[]`` otherwise.
    """
    wide = values.float()
    scale = (wide.abs().amax(1, keepdim=True) if rows else wide.abs().amax()) / torch.finfo(_FORMAT).max
    return (wide / scale).to(_FORMAT), scale


def fp8_product(a: Tensor, b: Tensor, rows: bool, fast: bool) -> Callable[[], Tensor]:
    """Round ``a`` ``[n, k]`` and ``b`` ``[m, k]``, and return a function that computes a bᵀ in bf16, ``[n, m]``."""
    (a8, scale_a), (b8, scale_b) = scaled(a, rows), scaled(b, rows)
    if rows:
        scale_b = scale_b.T.contiguous()
    options = {"scale_a": scale_a, "scale_b": scale_b, "out_dtype": torch.bfloat16, "use_fast_accum": fast}
    return partial(torch._scaled_mm, a8, b8.t(), **options)


def products(tokens: int, d_in: int, d_out: int, direction: str, device: str) -> dict[str, Callable[[], Tensor]]:
    """Return for each row a function that computes x Wᵀ ("fwd") or gy W ("bwd")."""
    torch.manual_seed(0)
    bf16 = {"device": device, "dtype": torch.bfloat16}
    W = torch.randn(d_out, d_in, **bf16) / d_in**0.5  # type: ignore[arg-type]
    if direction == "fwd":
        a, b = torch.randn(tokens, d_in, **bf16), W  # type: ignore[arg-type]
        plain = partial(F.linear, a, W)
    else:
        a, b = torch.randn(tokens, d_out, **bf16), W.T.contiguous()  # type: ignore[arg-type]
        plain = partial(torch.mm, a, W)
    return {"bf16": plain, **{name: fp8_product(a, b, *options) for name, options in FP8.items()}}


def measure(layer: str, tokens: int, device: str, repeats: int) -> list[dict[str, Any]]:
    """Measure both products of one layer, and return one line of the result file per row."""
    cuda = torch.device(device).type == "cuda"
    about = {"suite": "fp8_products", "model": "vit_b", "case": layer, "tokens": tokens, "dtype": "bfloat16"}
    about |= {"device": device, "l2": "cold" if cuda else None, "cuda_graphs": cuda, "repeats": repeats}
    errors: dict[str, dict[str, float]] = {}
    samples: dict[str, Samples] = {}
    reasons: dict[str, str] = {}
    for direction in PASSES:
        calls = products(tokens, *LAYERS[layer], direction, device)
        exact = calls["bf16"]().float()
        for name, call in list(calls.items()):
            try:
                error = float((call().float() - exact).norm() / exact.norm())
            except RuntimeError as failure:  # such as a GPU without fp8
                reasons[name] = f"failed: {str(failure).splitlines()[0]}"
                del calls[name]
                continue
            errors.setdefault(name, {})[direction] = error
            if not error < _LARGEST_ERROR:
                reasons[name] = f"wrong: the relative error of {direction} is {error:.2g}"
                del calls[name]
        samples[direction] = time_rows(calls, repeats, device=device, flush_l2=cuda, cuda_graphs=cuda)
    relative = {direction: ratios(seconds, "bf16") for direction, seconds in samples.items()}
    lines = []
    for name in ("bf16", *FP8):
        line = {**machine_facts(), **about, "row": name}
        if name in reasons:
            lines.append({**line, "reason": reasons[name]})
            continue
        line["errors"] = errors[name]
        line["seconds"] = {direction: quantiles(seconds[name]) for direction, seconds in samples.items()}
        line["ratio"] = {direction: quantiles(ratio[name]) for direction, ratio in relative.items()}
        lines.append(line)
    return lines


def block_ratio(lines: Sequence[dict[str, Any]], name: str) -> float | None:
    """Return the time of the eight products in a row, divided by that in bf16; None if a product has no time."""
    total: dict[str, float] = {}
    for row in (name, "bf16"):
        of_row = [line for line in lines if line["row"] == row and "seconds" in line]
        if {line["case"] for line in of_row} != set(LAYERS):
            return None
        total[row] = sum(line["seconds"][direction]["p50"] for line in of_row for direction in PASSES)
    return total[name] / total["bf16"]


def show(lines: Sequence[dict[str, Any]]) -> None:
    """Print the ratios of all products."""
    print(f"{'product':<10}{'bf16 us':>10}" + "".join(f"{name + ' / bf16':>20}" for name in FP8))
    of = {(line["case"], line["row"]): line for line in lines}
    for layer in LAYERS:
        for direction in PASSES:
            cells = [
                f"{found['ratio'][direction]['p50']:>20.3f}" if "ratio" in found else f"{'-':>20}"
                for found in (of[layer, name] for name in FP8)
            ]
            base = of[layer, "bf16"]["seconds"][direction]["p50"]
            print(f"{layer + ' ' + direction:<10}{1e6 * base:>10.1f}" + "".join(cells))
    blocks = [block_ratio(lines, name) for name in FP8]
    print(f"{'block':<20}" + "".join(f"{'-':>20}" if ratio is None else f"{ratio:>20.3f}" for ratio in blocks))
    for line in lines:
        if "reason" in line:
            print(f"{line['case']} {line['row']}: {line['reason']}")


def parser() -> Any:
    """Return the parser of the options."""
    options = parser_of("fp8_products", __doc__)
    options.prog = "python -m benchmarks fp8-products"
    options.add_argument("--device", default=default_device(), help="default: %(default)s")
    options.add_argument("--tokens", type=int, help=f"default: {TOKENS}, with --quick {_QUICK_TOKENS}")
    options.add_argument("--repeats", type=int, help="default: 50, with --quick 1")
    options.add_argument("--quick", action="store_true", help="few tokens and repeats; the times mean nothing")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, record and print all products."""
    args = parser().parse_args(arguments)
    tokens, repeats = (
        args.tokens or (_QUICK_TOKENS if args.quick else TOKENS),
        args.repeats or (1 if args.quick else 50),
    )
    lines = []
    for layer in LAYERS:
        found = measure(layer, tokens, args.device, repeats)
        path = append("fp8_products", found, args.results)
        lines += found
    show(lines)
    print(f"\nresults written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
