"""List the kernels of a ViT-B block and of a training step of ViT-B with their times, from torch's profiler.

    python -m benchmarks timeline
    EFFT_SM90_GENERATION=3 python -m benchmarks timeline

For each of the four layers of a block, the command profiles one forward and backward pass of the frozen baseline (the
row ``floor``) and of the op with a backend, and lists the kernels in the order of their start. With a newer generation
of kernels, it also profiles the op with factors that were converted beforehand (``packed:BACKEND``, see the command
``generations``). For a training step, it lists the kernels by name, with the number of their calls and their summed
time.

On a GPU, the times are those of kernels and copies on the device. On a CPU, they are those of torch's operators, which
only serves to try the command. The profiler slows the host down, so the gaps between kernels are longer than without
it. The command ``generations`` measures ratios without the profiler. This command does not check the results.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile

from benchmarks.generations import layer_rows, parser_of_block, step_rows
from benchmarks.model.step import Setting, training_step, unavailable
from benchmarks.ops import cases
from benchmarks.ops.cases import Case
from efft_kernels import Backend
from efft_kernels.measured import requested_kernels
from efft_lab.record import append, machine_facts

_WARMUP = 3  # unprofiled calls before the profiled ones
_CHARACTERS = 160  # names of templates can have thousands of characters


@dataclass(frozen=True)
class Span:
    """Hold one kernel: its name, its start in microseconds after that of the first kernel, and its microseconds."""

    kernel: str
    start: float
    us: float


def spans_of(run: Callable[[], object], device: str, repeats: int) -> list[Span]:
    """Profile ``repeats`` calls, and return the kernels of the call whose kernels took the median of the total time.

    Raises:
        RuntimeError: the profiler recorded no kernel.
    """
    cuda = torch.device(device).type == "cuda"
    for _ in range(_WARMUP):
        run()
    runs = sorted((_profiled(run, cuda) for _ in range(repeats)), key=busy)
    spans = runs[len(runs) // 2]
    if not spans:
        raise RuntimeError("the profiler recorded no kernel; on a GPU it needs permission to use CUPTI")
    return spans


def _profiled(run: Callable[[], object], cuda: bool) -> list[Span]:
    if cuda:
        torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as recorded:
        run()
        if cuda:
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    # On a GPU, annotations such as that of the optimizer's step contain the times of kernels. On a CPU, the time of an
    # operator contains the times of the operators that it calls.
    events = [
        e
        for e in recorded.events() or ()
        if e.device_type == wanted and not (e.is_user_annotation if cuda else e.cpu_parent)
    ]
    events.sort(key=lambda e: e.time_range.start)
    first = events[0].time_range.start if events else 0.0
    return [
        Span(e.name[:_CHARACTERS], round(e.time_range.start - first, 2), round(e.time_range.elapsed_us(), 2))
        for e in events
    ]


def busy(spans: Iterable[Span]) -> float:
    """Return the summed microseconds of kernels."""
    return sum(span.us for span in spans)


def elapsed(spans: Sequence[Span]) -> float:
    """Return the microseconds from the start of the first kernel to the end of the last one."""
    return max((span.start + span.us for span in spans), default=0.0)


def by_name(spans: Iterable[Span]) -> list[dict[str, Any]]:
    """Return the number of calls and the summed microseconds of each kernel, the longest one first."""
    found: dict[str, dict[str, Any]] = {}
    for span in spans:
        entry = found.setdefault(span.kernel, {"kernel": span.kernel, "calls": 0, "us": 0.0})
        entry["calls"] += 1
        entry["us"] = round(entry["us"] + span.us, 2)
    return sorted(found.values(), key=lambda entry: -entry["us"])


def about_run(device: str, row: str, **fields: Any) -> dict[str, Any]:
    """Return the fields of a result line that describe the measurement of a row."""
    facts = {**machine_facts(), "suite": "timeline", "generation": requested_kernels()}
    return {**facts, **fields, "device": device, "row": row}


def outcome(run: Callable[[], object], device: str, repeats: int, ordered: bool) -> dict[str, Any]:
    """Profile a function and return the fields of a result line that describe the outcome.

    With ``ordered``, the kernels are listed in the order of their start, and otherwise by name.
    """
    try:
        spans = spans_of(run, device, repeats)
    except RuntimeError as error:
        return {"reason": f"failed: {error}"}
    kernels = [asdict(span) for span in spans] if ordered else by_name(spans)
    times = {"busy_us": round(busy(spans), 2), "elapsed_us": round(elapsed(spans), 2)}
    return {"reason": None, "launches": len(spans), **times, "kernels": kernels}


def layer_lines(case: Case, backend: Backend, device: str, repeats: int) -> list[dict[str, Any]]:
    """Profile one forward and backward pass of each row of a layer."""
    inputs = case.inputs(device)
    lines = []
    for row in layer_rows(backend):
        reason = row.unavailable(inputs)
        if reason is None:
            found = outcome(row.build(inputs).forward_backward, device, repeats, ordered=True)
        else:
            found = {"reason": f"not available: {reason}"}
        lines.append(about_run(device, row.name, **asdict(case), tokens=case.sizes.tokens) | found)
    return lines


def step_lines(setting: Setting, backend: Backend, repeats: int) -> list[dict[str, Any]]:
    """Profile a training step of each row of a model."""
    about = asdict(setting)
    device = about.pop("device")
    lines = []
    for row in step_rows(backend):
        reason = unavailable(row, setting)
        if reason is None:
            found = outcome(training_step(row, setting.build(row), setting), device, repeats, ordered=False)
        else:
            found = {"reason": f"not available: {reason}"}
        lines.append(about_run(device, row.name, **about) | found)
    return lines


def show(lines: Iterable[dict[str, Any]]) -> None:
    """Print the kernels of each row."""
    for line in lines:
        print(f"\n{line.get('case') or line['model']}, {line['row']}, generation {line['generation']}")
        if line["reason"] is not None:
            print(line["reason"])
            continue
        print(f"{line['launches']} launches, {line['busy_us']:.1f} us in kernels, {line['elapsed_us']:.1f} us elapsed")
        for entry in line["kernels"]:
            count = f"{entry['calls']:>5} x" if "calls" in entry else f"{entry['start']:>9.1f}"
            print(f"{count} {entry['us']:>10.1f} us  {entry['kernel'][:90]}", flush=True)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    return parser_of_block("timeline", __doc__, repeats=5)


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile, print and record the layers of a block and a training step."""
    args = parser().parse_args(arguments)
    backend = Backend(args.backend)

    def record(lines: list[dict[str, Any]]) -> Path:
        show(lines)
        return append("timeline", lines, args.results)

    for dtype in args.dtype:
        for name in cases.LAYERS if "layers" in args.measure else ():
            case = Case(name, args.layers_of, args.images, args.rank, dtype)
            path = record(layer_lines(case, backend, args.device, args.repeats))
        if "step" in args.measure:
            setting = Setting(args.model, args.batch, args.rank, dtype, args.device)
            path = record(step_lines(setting, backend, args.repeats))
    print(f"\nresults written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
