"""Check and time every implementation of one adapted linear layer, and report ratios to the frozen baseline.

    python -m benchmarks ops --quick
    python -m benchmarks ops --set full --device cuda --model vit_b --dtype bfloat16

A row is one implementation, and a case is one layer with its sizes. A row is timed only if its output and all its
gradients are accurate: their errors may be at most twice those of the plain formula (benchmarks/budget.py). Otherwise
the line of the row contains the reason and no times. Every repetition measures all rows in turn. A ratio is the median,
over the repetitions, of the row's time divided by the time of the frozen baseline in the same repetition. The frozen
baseline (the row "floor") computes the frozen layer and dx. Run the command on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.budget import SMALL, Budget, small_update_error
from benchmarks.counts import Peaks, measure_peaks
from benchmarks.ops import cases, rows
from benchmarks.ops.cases import DTYPES, LAYERS, MODELS, SETS, Case, Inputs
from benchmarks.ops.rows import ROWS, Layer, LayerRow
from benchmarks.options import default_device, parser_of
from benchmarks.timing import Samples, ratios, time_rows
from efft_lab.record import append, machine_facts, quantiles

#: The phases that are timed: the name of each phase in result files, and the method of :class:`Layer` that runs it.
PHASES = {"fwd": "forward", "bwd": "backward", "fwd_bwd": "forward_backward"}


@dataclass(frozen=True)
class Setting:
    """Hold the settings of a measurement.

    Attributes:
        device: ``cpu`` or ``cuda``.
        repeats, warmup: see :func:`benchmarks.timing.time_rows`.
        l2: state of the L2 cache before each sample: ``cold`` or ``warm`` on a GPU, None elsewhere.
        cuda_graphs: whether to time replays of CUDA graphs.
    """

    device: str = "cpu"
    repeats: int = 10
    warmup: int = 2
    l2: str | None = None
    cuda_graphs: bool = False


def measure(case: Case, wanted: Sequence[LayerRow], setting: Setting) -> list[dict[str, Any]]:
    """Measure every row and return one line of the result file per row, with times and ratios or with a ``reason``.

    ``wanted`` must contain the frozen baseline; otherwise no row is timed.
    """
    torch.compiler.reset()  # otherwise the shapes of earlier cases count toward the recompilation limit
    inputs = case.inputs(setting.device)
    budget = Budget(inputs)
    judged = {row.name: judge(row, inputs, budget) for row in wanted}
    layers = {name: layer for name, (layer, _) in judged.items() if layer is not None}
    figures = _time(layers, setting) if "floor" in layers else {}
    lines = []
    for row in wanted:
        line = {**_about(case, setting), "row": row.name, **judged[row.name][1]}
        if row.name in figures:
            line |= figures[row.name] | _against_limits(row, case, figures[row.name]["seconds"], setting.device)
        elif line["reason"] is None:
            line["reason"] = figures.get("reason", "not timed: the frozen baseline failed its check")
        lines.append(line)
    return lines


def judge(row: LayerRow, inputs: Inputs, budget: Budget) -> tuple[Layer | None, dict[str, Any]]:
    """Check a row. Return (layer, fields of the result line).

    For a row that passes, the fields are the errors that the check found. For any other row the layer is None, and the
    only field is the ``reason``.
    """
    reason = row.unavailable(inputs)
    if reason is not None:
        return None, {"reason": f"not available: {reason}"}
    try:
        layer = row.build(inputs)
        results = layer.results()
        reason = budget.verdict(row, results)
        if reason is not None:
            return None, {"reason": reason}
        found: dict[str, Any] = {"reason": None, "errors": budget.errors(row, results)}
        if row.adapts:
            found["small_update_error"] = small_update_error(row, inputs)
        return layer, found
    except Exception as error:  # a row that fails must not end the run
        return None, {"reason": f"failed: {type(error).__name__}: {first_line(error)}"}


def _time(layers: dict[str, Layer], setting: Setting) -> dict[str, Any]:
    """Return ``seconds`` and ``ratio`` of each row, by phase, or only a ``reason`` if the measurement failed."""
    calls = {
        phase: {name: getattr(layer, method) for name, layer in layers.items()} for phase, method in PHASES.items()
    }
    try:
        samples: dict[str, Samples] = {
            phase: time_rows(
                rows_of_phase,
                setting.repeats,
                setting.warmup,
                setting.device,
                flush_l2=setting.l2 == "cold",
                cuda_graphs=setting.cuda_graphs,
            )
            for phase, rows_of_phase in calls.items()
        }
    except RuntimeError as error:  # such as out of memory, or a row that no CUDA graph can capture
        return {"reason": f"timing failed: {first_line(error)}"}
    relative = {phase: ratios(seconds) for phase, seconds in samples.items()}
    return {
        name: {
            "seconds": {phase: quantiles(seconds[name]) for phase, seconds in samples.items()},
            "ratio": {phase: quantiles(ratio[name]) for phase, ratio in relative.items()},
        }
        for name in layers
    }


def _about(case: Case, setting: Setting) -> dict[str, Any]:
    sizes = case.sizes
    shape = {"tokens": sizes.tokens, "d_in": sizes.d_in, "d_out": sizes.d_out}
    return {**machine_facts(), "suite": "ops", **asdict(case), **shape, **asdict(setting)}


def _against_limits(row: LayerRow, case: Case, seconds: dict[str, dict[str, float]], device: str) -> dict[str, Any]:
    """Return the arithmetic limit of the ratio, and the achieved fractions of the machine's measured peaks, by phase.

    The limit is the ratio of the required FLOPs of the row and of the frozen baseline. The fractions count only the
    FLOPs and bytes that the result requires. The work of the update counts only if the row trains the factors.
    """
    peaks, sizes = measured_peaks(device, case.dtype), case.sizes
    limit, gemm, copy = {}, {}, {}
    for phase in PHASES:
        work = sizes.floor(phase) + sizes.delta(phase) if row.trains else sizes.floor(phase)
        limit[phase] = sizes.limit(phase) if row.trains else 1.0
        gemm[phase] = work.flops / seconds[phase]["p50"] / peaks.flops_per_s
        copy[phase] = work.bytes / seconds[phase]["p50"] / peaks.bytes_per_s
    return {"limit": limit, "of_gemm_peak": gemm, "of_copy_peak": copy, "peaks": asdict(peaks)}


@functools.cache
def measured_peaks(device: str, dtype: str) -> Peaks:
    """Return :func:`benchmarks.counts.measure_peaks`, measured once per process."""
    return measure_peaks(device, DTYPES[dtype])


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return the lines of one case as a table for the terminal."""
    out = [
        f"{'row':<16}{'ratio to floor: fwd':>20}{'bwd':>8}{'both':>8} {'p20..p80':>14}{'both ms':>11}"
        f"{'limit':>8}{'GEMM peak':>11}{'copy peak':>11}{'small dW':>10}"
    ]
    for line in lines:
        if "ratio" not in line:
            out.append(f"{line['row']:<16} -- {line['reason']}")
            continue
        ratio, seconds = line["ratio"], line["seconds"]["fwd_bwd"]
        both, error = ratio["fwd_bwd"], line.get("small_update_error")
        out.append(
            f"{line['row']:<16}{ratio['fwd']['p50']:>20.3f}{ratio['bwd']['p50']:>8.3f}{both['p50']:>8.3f} "
            f"{both['p20']:>6.3f}..{both['p80']:<6.3f}{seconds['p50'] * 1e3:>11.3f}{line['limit']['fwd_bwd']:>8.3f}"
            f"{line['of_gemm_peak']['fwd_bwd']:>11.0%}{line['of_copy_peak']['fwd_bwd']:>11.0%}"
            f"{'' if error is None else f'{error:.1f}x':>10}"
        )
    return "\n".join(out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command ``ops``."""
    args = _parser().parse_args(arguments)
    chosen = cases.select(
        "quick" if args.quick else args.set,
        case=args.case,
        model=args.model,
        images=args.images,
        rank=args.rank,
        dtype=args.dtype,
    )
    wanted = rows.select(args.rows)
    cuda = torch.device(args.device).type == "cuda"
    setting = Setting(
        device=args.device,
        repeats=args.repeats or (5 if args.quick else 10),
        warmup=1 if args.quick else 2,
        l2=args.l2 if cuda else None,
        cuda_graphs=cuda and not args.no_cuda_graphs,
    )
    for row in wanted:
        print(f"{row.name:<16}{row.explains}")
    print(
        "\nboth: forward and backward pass together; limit: the lowest possible ratio of these, at equal FLOP/s\n"
        "GEMM peak, copy peak: achieved fractions of the speed of a large product and of a large copy\n"
        f"small dW: error of y for an update of {SMALL:g} times the size of the frozen weight, "
        "as a multiple of the plain formula's error in the same precision\n"
    )
    path = None
    for case in chosen:
        lines = measure(case, wanted, setting)
        path = append("ops", lines, args.results)
        print(f"{case}\n{table(lines)}\n", flush=True)
    print(f"results written to {path}")


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("ops", __doc__)
    parser.add_argument("--set", choices=SETS, default="full", help="named set of cases")
    parser.add_argument("--quick", action="store_true", help="measure the set 'quick' with few repetitions")
    parser.add_argument("--case", nargs="+", metavar="NAME", help=f"any of {', '.join(LAYERS)}")
    parser.add_argument("--model", nargs="+", metavar="NAME", help=f"any of {', '.join(MODELS)}")
    parser.add_argument(
        "--images", nargs="+", type=int, metavar="N", help="images in the batch; 8 images of ViT-B are 1576 tokens"
    )
    parser.add_argument("--rank", nargs="+", type=int, metavar="R")
    parser.add_argument("--dtype", nargs="+", metavar="NAME", help=f"any of {', '.join(DTYPES)}")
    parser.add_argument(
        "--rows", nargs="+", metavar="NAME", help=f"any of {', '.join(ROWS)}; the frozen baseline is always measured"
    )
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--repeats", type=int, help="number of samples per row (default: 10; 5 with --quick)")
    parser.add_argument("--l2", choices=("cold", "warm"), default="cold", help="state of the GPU's L2 cache")
    parser.add_argument(
        "--no-cuda-graphs", action="store_true", help="launch each kernel from Python instead of replaying a graph"
    )
    return parser


if __name__ == "__main__":
    main()
