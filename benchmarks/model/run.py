"""Measure the time and memory of one training step of a complete model, adapted in several ways.

    python -m benchmarks model --quick

A row is one way to adapt the model. A step consists of a forward pass, a backward pass and AdamW. Every repetition
measures all rows in turn. A ratio divides the time of a row by the time of the frozen baseline in the same repetition.
The frozen baseline (the row "floor") trains only the head, which is the classifier of the model. If the logits or the
factor gradients of a row are wrong, its line contains the reason and no times. With ``--cuda-graphs`` a step is the
replay of a CUDA graph, which excludes the work of the host. Without this option the host may limit the speed. In the
table, "saved" is the memory that the forward pass saves for the backward pass, and "adapter" is the size of all trained
tensors except the head. Run the command on an idle machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from benchmarks.memory import saved_by
from benchmarks.model.gate import Gate
from benchmarks.model.rows import ROWS, ModelRow, select
from benchmarks.model.step import Setting, adapter_bytes, trainable, training_step, unavailable
from benchmarks.options import parser_of_measurement
from benchmarks.timing import Captured, ratios, time_rows
from efft_lab.record import append, machine_facts, quantiles

#: All rows except the slow reference backend, BitFit (which takes little longer than the baseline), and two rows with
#: the backend ``auto``, which repeat the row of the backend that ``auto`` chooses.
QUICK_ROWS = [name for name in ROWS if name not in ("efft:reference", "bitfit", "efft:auto", "fused:auto")]


def measure(setting: Setting, rows: Sequence[ModelRow], repeats: int) -> list[dict[str, Any]]:
    """Measure every row and return one line of the result file per row; a row that was not timed has a ``reason``."""
    gate, plain = Gate(setting), setting.plain()
    found: dict[str, dict[str, Any]] = {}
    steps = {}
    pool = None  # all graphs share this memory pool: a step frees all its allocations, and steps never overlap
    for row in rows:
        try:
            found[row.name], step = _prepare(row, setting, gate, plain)
            if step is not None and setting.cuda_graphs:
                step = Captured.of(step, pool=pool)
                pool = step.graph.pool()
            if step is not None:
                steps[row.name] = step
        except (RuntimeError, ImportError) as error:  # such as out of memory; continue with the other rows
            found[row.name] = {"reason": f"failed: {error}"}
            pool = None
        print(f"{row.name:<16} {found[row.name].get('reason', 'checked')}", flush=True)
    # On a CPU no more warm-up is necessary, because each row has already run one step in ``_prepare``.
    samples = time_rows(steps, repeats, warmup=2 if setting.device != "cpu" else 0, device=setting.device)
    relative = ratios(samples) if "floor" in samples else {}
    for name, seconds in samples.items():
        of_row = quantiles(seconds)
        found[name] |= {"seconds": of_row, "images_per_s": setting.batch / of_row["p50"]}
        if name in relative:
            found[name]["ratio"] = quantiles(relative[name])
    common = {**machine_facts(), "suite": "model", **asdict(setting)}
    return [{**common, "row": name, **line} for name, line in found.items()]


def _prepare(row: ModelRow, setting: Setting, gate: Gate, plain: nn.Module) -> tuple[dict[str, Any], Any]:
    """Return the facts about a row that do not depend on time, and its training step.

    The step is None if the row must not be timed. The facts then contain the ``reason``.
    """
    reason = unavailable(row, setting)
    if reason is not None:
        return {"reason": f"not available: {reason}"}, None
    model = setting.build(row)
    wrong = gate.verdict(row, model)
    if wrong is not None:
        return {"reason": f"wrong: {wrong}"}, None
    facts = {
        "saved_bytes": saved_by(row, model, setting),
        "trainable": trainable(model),
        "adapter_bytes": adapter_bytes(model, plain),
    }
    step = training_step(row, model, setting)
    if setting.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    step()
    if setting.device != "cpu":
        facts["step_peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return facts, step


def show(lines: Sequence[dict[str, Any]]) -> None:
    """Print the table of one setting."""
    first = lines[0]
    graphs = ", CUDA graphs" if first["cuda_graphs"] else ""
    print(
        f"\n{first['model']}, batch {first['batch']}, rank {first['rank']}, {first['dtype']}, {first['device']}{graphs}"
    )
    print(
        f"{'row':<16} {'ms':>9} {'images/s':>9} {'ratio to floor':>21} {'saved MiB':>10} {'trainable':>11} "
        f"{'adapter kB':>10}"
    )
    for line in lines:
        if "reason" in line:
            print(f"{line['row']:<16} {line['reason']}")
            continue
        ratio = line.get("ratio")
        relative = "-" if ratio is None else f"{ratio['p50']:.3f} [{ratio['p20']:.3f}, {ratio['p80']:.3f}]"
        print(
            f"{line['row']:<16} {1e3 * line['seconds']['p50']:>9.1f} {line['images_per_s']:>9.2f} {relative:>21} "
            f"{line['saved_bytes'] / 2**20:>10.1f} {line['trainable']:>11,} {line['adapter_bytes'] / 1e3:>10.1f}"
        )


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    options = parser_of_measurement("model", __doc__)
    options.add_argument("--model", nargs="+", default=[Setting.model], help="timm names; ViT or Swin")
    options.add_argument("--batch", type=int, help="number of images; default: 8 on a CPU, 64 on a GPU")
    options.add_argument("--rank", type=int, default=Setting.rank)
    options.add_argument(
        "--cuda-graphs", action="store_true", help="time replays of the captured step, which exclude the host's work"
    )
    options.add_argument("--repeats", type=int, help="default: 10, with --quick 2")
    options.add_argument(
        "--rows", nargs="+", help="default: all, or with --quick a selection; the frozen baseline is always measured"
    )
    options.add_argument("--quick", action="store_true", help="use few repeats and rows")
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print and record every setting."""
    options = parser()
    args = options.parse_args(words)
    if args.cuda_graphs and torch.device(args.device).type != "cuda":
        options.error(f"--cuda-graphs needs a CUDA device, got --device {args.device}")
    rows = select(args.rows or (QUICK_ROWS if args.quick else None))
    batch = args.batch or (8 if args.device == "cpu" else 64)
    repeats = args.repeats or (2 if args.quick else 10)
    for name in args.model:
        for dtype in args.dtype:
            lines = measure(Setting(name, batch, args.rank, dtype, args.device, args.cuda_graphs), rows, repeats)
            path = append("model", lines, args.results)
            show(lines)
    print(f"\nresults written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
