"""Measure how the time of one layer grows with the number of tokens and with the rank, and fit exponents.

    python -m benchmarks scaling
    python -m benchmarks scaling --quick

Each time covers a forward and a backward pass. A row is one implementation. The frozen baseline (the row
"floor") is the layer without an update. An exponent is the slope of a straight line that is fitted to the logarithms of
times over the logarithms of sizes. For each row, the command fits one exponent to the times and another (``of added``
in the table) to the differences between the times of the row and those of the frozen baseline.

A line of the result file with ``seconds`` is a measurement. A line with ``exponent`` is a fit over the ``sizes`` in
that line. A row whose results are wrong is not timed (benchmarks/ops/run.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from benchmarks.ops import rows
from benchmarks.ops.cases import DTYPES, LAYERS, Case
from benchmarks.ops.rows import ROWS
from benchmarks.ops.run import Setting, measure
from benchmarks.options import default_device, parser_of
from efft_lab.record import append, machine_facts

#: The sizes of each sweep and of its quick version. The sizes of the sweep "tokens" are numbers of images, which have
#: 197 tokens each. Those of "rank" are ranks.
SWEEPS = {
    "tokens": ([1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 8]),
    "rank": ([8, 16, 24, 32, 48, 64], [8, 32, 64]),
}
DEFAULT_ROWS = ("efft:eager", "naive")


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float | None:
    """Return the slope of log ``seconds`` over log ``sizes``.

    The result is None for fewer than two sizes, or if a time (which may be a difference of times) is not positive.
    """
    if len(sizes) < 2 or min(seconds) <= 0:
        return None
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def sweep(
    name: str, sizes: Sequence[int], case: Case, wanted: Sequence[rows.LayerRow], setting: Setting
) -> list[dict[str, Any]]:
    """Measure ``case`` at all ``sizes``. Return the measurements, and the fits of all rows that have every time."""
    field = "images" if name == "tokens" else name
    lines = []
    for size in sizes:
        for line in measure(Case(**{**asdict(case), field: size}), wanted, setting):
            lines.append({**line, "suite": "scaling", "sweep": name})
    return lines + [fit for row in wanted if (fit := _fit(name, row.name, lines)) is not None]


def _fit(name: str, row: str, lines: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    floor, own = ([line for line in lines if line["row"] == r] for r in ("floor", row))
    if any("seconds" not in line for line in own):
        return None
    sizes = [line[name] for line in own]
    seconds, base = ([line["seconds"]["fwd_bwd"]["p50"] for line in of] for of in (own, floor))
    added = [a - b for a, b in zip(seconds, base, strict=True)]
    about = {key: own[0][key] for key in ("model", "case", "dtype", "device", "l2", "cuda_graphs")}
    return {
        **machine_facts(),
        "suite": "scaling",
        "sweep": name,
        **about,
        "row": row,
        "sizes": sizes,
        "exponent": exponent(sizes, seconds),
        "exponent_added": None if row == "floor" else exponent(sizes, added),
    }


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return one sweep as a table for the terminal: the times in ms by size, the exponents, and rows without times."""
    fits = [line for line in lines if "exponent" in line]
    if not fits:
        return "\n".join(sorted({f"{line['row']:<16} -- {line['reason']}" for line in lines}))
    name = fits[0]["sweep"]
    out = [f"{name:<16}" + "".join(f"{size:>10}" for size in fits[0]["sizes"]) + f"{'exponent':>10}{'of added':>10}"]
    for fit in fits:
        own = [line for line in lines if line["row"] == fit["row"] and "seconds" in line]
        times = "".join(f"{line['seconds']['fwd_bwd']['p50'] * 1e3:>10.3f}" for line in own)
        slopes = "".join(f"{'-' if e is None else f'{e:.2f}':>10}" for e in (fit["exponent"], fit["exponent_added"]))
        out.append(f"{fit['row']:<16}{times}{slopes}")
    refused = {f"{line['row']:<16} -- {line['reason']}" for line in lines if line.get("reason")}
    return "\n".join([*out, *sorted(refused)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command ``scaling``."""
    args = _parser().parse_args(arguments)
    wanted = rows.select(args.rows)
    cuda = torch.device(args.device).type == "cuda"
    setting = Setting(args.device, args.repeats, l2="cold" if cuda else None, cuda_graphs=cuda)
    path = None
    for dtype in args.dtype:
        case = Case(args.case, "vit_b", images=8 if args.device == "cpu" else 64, rank=32, dtype=dtype)
        for name in args.sweep:
            full, quick = SWEEPS[name]
            lines = sweep(name, quick if args.quick else full, case, wanted, setting)
            path = append("scaling", lines, args.results)
            print(f"{args.case} of ViT-B, {dtype}, ms\n{table(lines)}\n", flush=True)
    print(f"results written to {path}")


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("scaling", __doc__)
    parser.add_argument("--quick", action="store_true", help="few sizes")
    parser.add_argument("--sweep", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--case", choices=LAYERS, default="qkv")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument(
        "--rows", nargs="+", metavar="NAME", default=list(DEFAULT_ROWS), help=f"any of {', '.join(ROWS)}"
    )
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--repeats", type=int, default=5)
    return parser


if __name__ == "__main__":
    main()
