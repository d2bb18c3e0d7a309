"""Measure the memory that a training step saves for its backward pass, and the peak memory of the process.

    python -m benchmarks memory --quick

The command measures single layers (``--level layer``) and complete models (``--level model``). A row is one
implementation in the comparison, and every row runs in a new process. The command records three numbers per row:

- saved: the bytes of the storages that autograd saves between the forward and the backward pass. Each storage counts
  once. Storages that exist before the forward pass, such as weights and factors, do not count. There is one exception:
  the input of a single layer counts, but the images of a model do not. Copies of weights that autocast creates count.
- peak: the largest memory of the process up to the end of the second step. On a CPU this is the resident memory
  (``VmHWM``), and on a GPU the memory that torch has allocated.
- before: the memory in use after the model is created and before the first step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.model import rows as model_rows
from benchmarks.model.step import Setting, training_step, unavailable
from benchmarks.ops import cases
from benchmarks.ops import rows as layer_rows
from benchmarks.options import parser_of_measurement
from efft.hints import did_you_mean
from efft_lab.record import append, machine_facts

ROOT = Path(__file__).parents[1]


def saved_for_backward(forward: Callable[[], object], inputs: Iterable[Tensor] = ()) -> int:
    """Return the bytes of the storages that autograd saves in ``forward``, without those that existed before.

    The function runs ``forward`` twice and keeps both results. If both graphs hold a storage, it existed before the
    calls. Such a storage counts only if it belongs to one of the ``inputs``. Each storage counts once.
    """
    first: dict[int, int] = {}
    second: dict[int, int] = {}
    results = [_with_storages(forward, kept) for kept in (first, second)]
    older = set(first) & set(second) - {tensor.untyped_storage().data_ptr() for tensor in inputs}
    del results  # the graphs must live until here; otherwise two storages could have the same address
    return sum(n_bytes for address, n_bytes in second.items() if address not in older)


def _with_storages(forward: Callable[[], object], kept: dict[int, int]) -> object:
    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # saving an output itself would create a reference cycle with its graph

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return forward()


def measure_layer(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure one row for one layer.

    ``spec`` contains the fields of a :class:`benchmarks.ops.cases.Case`, the name of a row and a ``device``.
    """
    spec = dict(spec)
    row, device = layer_rows.ROWS[spec.pop("row")], spec.pop("device")
    inputs = cases.Case(**spec).inputs(device)
    reason = row.unavailable(inputs)
    if reason is not None:
        return {"reason": f"not available: {reason}"}
    layer = row.build(inputs)
    peaks = peak(layer.forward_backward, device)
    return {"saved_bytes": saved_for_backward(layer.forward, [inputs.x]), **peaks}


def measure_model(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure one row for a complete model.

    ``spec`` contains the fields of a :class:`benchmarks.model.step.Setting` and the name of a row.
    """
    spec = dict(spec)
    row, setting = model_rows.ROWS[spec.pop("row")], Setting(**spec)
    reason = unavailable(row, setting)
    if reason is not None:
        return {"reason": f"not available: {reason}"}
    module = setting.build(row)
    peaks = peak(training_step(row, module, setting), setting.device)
    return {"saved_bytes": saved_by(row, module, setting), **peaks}


def saved_by(row: model_rows.ModelRow, module: torch.nn.Module, setting: Setting) -> int:
    """Return the bytes that a forward pass of ``row``'s model saves for the backward pass."""
    images, labels = setting.examples(module)
    with row.running():
        return saved_for_backward(lambda: setting.loss(module, images, labels))


def peak(step: Callable[[], object], device: str) -> dict[str, int]:
    """Run two steps and return memory sizes in bytes.

    ``before_bytes`` is the memory in use before the steps. ``peak_bytes`` is the largest memory up to their end. On a
    CPU both are resident memory of the process, and the peak includes the time before the call. On a GPU both count the
    memory that torch has allocated.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(), step()
        return {"peak_bytes": torch.cuda.max_memory_allocated(), "before_bytes": before}
    before = _status("VmRSS")
    step(), step()
    return {"peak_bytes": _status("VmHWM"), "before_bytes": before}


def _status(field: str) -> int:
    """Return a memory field of this process's status in Linux, in bytes.

    ``getrusage`` would return the peak of the parent process if that peak is larger.
    """
    path = Path("/proc/self/status")
    if not path.exists():
        raise RuntimeError(f"the peak memory of a process is read from {path}, which does not exist on this system")
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


LEVELS = {"layer": measure_layer, "model": measure_model}


def in_new_process(level: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Run ``LEVELS[level](spec)`` in a new process and return its result, or a ``reason`` if the process fails."""
    command = [sys.executable, "-m", "benchmarks.memory", "--measure", level, json.dumps(spec)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # the child process must find the same modules as this process
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if child.returncode:
        last = child.stderr.strip().splitlines()[-1:] or [f"exit status {child.returncode}"]
        return {"reason": f"failed: {last[0]}"}
    return json.loads(child.stdout.splitlines()[-1])


def specifications(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the level and the specification of every row to measure.

    Each level measures those of ``args.rows`` that it has.

    Raises:
        ValueError: none of the requested levels has a row of this name.
    """
    known = {name for level in args.level for name in (model_rows.ROWS if level == "model" else layer_rows.ROWS)}
    for name in args.rows or ():
        if name not in known:
            raise ValueError(f"unknown row {name!r}: {did_you_mean(name, sorted(known))}")

    def wanted(rows: Mapping[str, Any]) -> list[str] | None:
        return None if args.rows is None else [name for name in args.rows if name in rows]

    images, dtypes = (2, ["float32"]) if args.quick else (args.batch, args.dtype)
    if "model" in args.level:
        for dtype in dtypes:
            setting = Setting(args.model, images, args.rank, dtype, args.device)
            names = [row.name for row in model_rows.select(wanted(model_rows.ROWS))]
            yield from (("model", {**asdict(setting), "row": name}) for name in names)
    if "layer" in args.level:
        layers = ["fc1"] if args.quick else None
        for case in cases.select("quick", case=layers, images=[images], rank=[args.rank], dtype=dtypes):
            names = [row.name for row in layer_rows.select(wanted(layer_rows.ROWS))]
            yield from (("layer", {**asdict(case), "device": args.device, "row": name}) for name in names)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    options = parser_of_measurement("memory", __doc__)
    options.add_argument("--level", nargs="+", choices=list(LEVELS), default=list(LEVELS))
    options.add_argument(
        "--model",
        default=Setting.model,
        help="timm name, for --level model; --level layer always measures layers of ViT-B",
    )
    options.add_argument("--batch", type=int, default=8, help="images")
    options.add_argument("--rank", type=int, default=Setting.rank)
    options.add_argument(
        "--rows",
        nargs="+",
        help="rows of the commands model and ops; each level measures those that it has; default: all",
    )
    options.add_argument("--quick", action="store_true", help="use 2 images, float32, and only fc1 of the layers")
    options.add_argument("--measure", nargs=2, metavar=("LEVEL", "JSON"), help=argparse.SUPPRESS)
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print and record every row."""
    args = parser().parse_args(words)
    if args.measure:
        level, spec = args.measure
        print(json.dumps(LEVELS[level](json.loads(spec))))
        return 0
    print(f"{'level':<6} {'what':<26} {'dtype':<9} {'row':<16} {'saved MiB':>10} {'peak MiB':>10} {'before MiB':>10}")
    path = None
    for level, spec in specifications(args):
        found = in_new_process(level, spec)
        path = append("memory", [{**machine_facts(), "suite": "memory", "level": level, **spec, **found}], args.results)
        sizes = [f"{found[f'{name}_bytes'] / 2**20:>10.1f}" for name in ("saved", "peak", "before") if len(found) > 1]
        what = f"{spec['model']} {spec.get('case', '')}".strip()
        print(
            f"{level:<6} {what:<26} {spec['dtype']:<9} {spec['row']:<16} {' '.join(sizes) or found['reason']}",
            flush=True,
        )
    print(f"results written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
