"""What ``auto`` takes on a GPU: the fused kernels where a measurement says that they beat the vendor's products.

    python -m efft_kernels.choice --out measured.json --tokens 12608 --d-in 768 --d-out 2304 768 3072 --rank 16 32

Origin of the rows of ``measured.json`` beside this file: the GPU and versions that each names. No GPU's name decides
anything: a row holds for its compute capability, and for the backends it names. Where no row fits, ``auto`` takes the
vendor's products; with ``EFFT_AUTOTUNE=FILE`` it measures on the spot and keeps the row in FILE, whose rows come before
those committed. All give the same bits run to run, since no kernel adds atomically; a choice changes speed and the last
rounding, so under ``torch.use_deterministic_algorithms(True)`` only what the tables hold decides.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COMMITTED = Path(__file__).with_name("measured.json")
#: Ops whose fused kernels have a rival.
OPS = ("tt_linear", "tt_gelu_linear", "tt_norm_linear")
#: What is compared: the vendor's products and the fused kernels.
RIVALS = ("eager", "triton", "cuda")
#: A row speaks for sizes up to this factor away: tiles and waves change little within it.
NEAR = 2.0
#: Bytes of a table: as many as ten thousands of rows have.
_LARGEST = 16 * 2**20


@dataclass(frozen=True)
class Case:
    """What a measurement is of: an op's sizes, its dtype ("bfloat16") and what :func:`generation` says of the GPU."""

    op: str
    tokens: int
    d_in: int
    d_out: int
    r1: int
    dtype: str
    capability: int


@dataclass(frozen=True)
class Row:
    """Microseconds of forward and backward by each backend, fastest first, and where they were measured."""

    case: Case
    microseconds: dict[str, float]
    origin: str

    def __post_init__(self) -> None:
        # Not when asked for the fastest: torch.compile may take these floats for inputs, which it cannot compare.
        object.__setattr__(self, "microseconds", dict(sorted(self.microseconds.items(), key=lambda item: item[1])))


def generation(device: torch.device | str) -> int:
    """A GPU's major compute capability, negative for AMD's, which are counted otherwise."""
    major = torch.cuda.get_device_capability(device)[0]
    return -major if torch.version.hip else major


def read(path: Path) -> tuple[Row, ...]:
    """The rows of a table; ValueError, naming the file, if it is none."""
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST} bytes")
        return tuple(map(_row, json.loads(path.read_text())))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is no table of measurements ({error!r}): delete it, or name another file") from None


def _row(values: dict[str, Any]) -> Row:
    """A row from its JSON; ValueError, TypeError or KeyError if a part is missing or of another kind."""
    row = Row(Case(**values["case"]), dict(values["microseconds"]), values["origin"])
    names, numbers = asdict(row.case), ("tokens", "d_in", "d_out", "r1", "capability")
    sizes = {name: names.pop(name) for name in numbers}
    wrong = [name for name, value in names.items() if not isinstance(value, str)]
    wrong += [name for name, value in sizes.items() if type(value) is not int or abs(value) >= 2**40]
    wrong += [name for name, us in row.microseconds.items() if not 0 <= us < math.inf]
    if wrong or not isinstance(row.origin, str):
        raise ValueError(f"{wrong[0] if wrong else 'origin'} has a value of another kind")
    return row


def write(path: Path, rows: Sequence[Row]) -> None:
    """Replace the table as a whole, so that a reader beside us sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    beside.replace(path)


def _own_table() -> Path | None:
    name = os.environ.get("EFFT_AUTOTUNE")
    return Path(name).expanduser() if name else None


def _read_all() -> list[Row]:
    own = _own_table()
    return [*(read(own) if own is not None and own.exists() else ()), *read(COMMITTED)]


#: Read at import, and no cache: torch.compile guards on a global, but cannot read files.
_rows = _read_all()


def fastest(case: Case, device: torch.device, backends: Sequence[str]) -> str | None:
    """Which of ``backends`` measured fastest, for this case or one like it; None where nothing was measured."""
    row = nearest(case, _rows, 1.0)
    if row is None and _own_table() is not None and _can_measure(device):
        row = measure(case, device, backends)
        _rows.append(row)
        _keep(row)
    row = row or nearest(case, _rows, NEAR)
    if row is None and case.op != "tt_linear":  # most of what it does is the same product
        row = nearest(replace(case, op="tt_linear"), _rows, NEAR)
    return next((b for b in row.microseconds if b in backends), None) if row is not None else None


def settled(device: torch.device) -> bool:
    """Whether :func:`fastest` would answer the same again: not where it may measure later what it may not now."""
    return _own_table() is None or _can_measure(device)


def nearest(case: Case, rows: Sequence[Row], widths: float) -> Row | None:
    """The row most like ``case`` in tokens, d_in and d_out (the first of equals), if one is near: tokens up to a factor
    of :data:`NEAR` away, d_in and d_out up to ``widths``; whole 16 bytes a row, as the fastest kernels want them, or
    not, as in ``case``; the same rank once it is padded to a power of two, 32 at least; one 16-bit type for the other.
    """

    def kind(c: Case) -> tuple[Any, ...]:
        dtype = "bfloat16" if c.dtype == "float16" else c.dtype
        return c.op, c.d_in % 8 == 0, c.d_out % 8 == 0, max(c.r1 - 1, 31).bit_length(), dtype, c.capability

    wanted = kind(case)
    best, least = None, math.inf
    for row in rows:
        tokens, d_in, d_out = (
            abs(math.log(max(one, 1) / max(other, 1)))
            for one, other in zip(_sizes(case), _sizes(row.case), strict=True)
        )
        near = tokens <= math.log(NEAR) and max(d_in, d_out) <= math.log(widths)
        if near and tokens + d_in + d_out < least and kind(row.case) == wanted:
            best, least = row, tokens + d_in + d_out
    return best


def _sizes(case: Case) -> tuple[int, int, int]:
    return case.tokens, case.d_in, case.d_out


def _can_measure(device: torch.device) -> bool:
    """Not where a measurement would be traced or captured, nor under torch.use_deterministic_algorithms: two runs may
    measure differently, and the other backend rounds otherwise."""
    traced = torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    return not traced and not torch.are_deterministic_algorithms_enabled()


def _keep(row: Row) -> None:
    path = _own_table()
    assert path is not None
    write(path, [*(read(path) if path.exists() else ()), row])


def measure(case: Case, device: torch.device | str, backends: Sequence[str] = RIVALS, repeats: int = 20) -> Row:
    """Time forward and backward of ``case`` by each backend, interleaved; the best of ``repeats`` counts.

    On a GPU the kernels alone, replayed as a graph: in training the host works ahead of them.
    """
    device = torch.device(device)
    with contextlib.ExitStack() as around:  # what the caller is in the middle of is none of a measurement's business
        around.enter_context(torch.inference_mode(False))
        around.enter_context(torch.enable_grad())
        around.enter_context(torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is))
        if device.type == "cuda":
            around.enter_context(torch.cuda.device(device))
        return Row(case, _microseconds(case, device, backends, repeats), _origin(device))


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _microseconds(case: Case, device: torch.device, backends: Sequence[str], repeats: int) -> dict[str, float]:
    # Not imported above: they use the backends, which use this module.
    ops, testing = (importlib.import_module(f"efft_kernels.{name}") for name in ("ops", "testing"))
    sizes = {"tokens": case.tokens, "d_in": case.d_in, "d_out": case.d_out, "r1": case.r1}
    dtype = getattr(torch, case.dtype)
    inputs = testing.make_inputs(case.op, **sizes, dtype=dtype, factor_dtype=torch.float32, device=device)
    leaves = [inputs[name].requires_grad_() for name in (next(iter(inputs)), "D", "G")]
    gy = torch.ones(case.tokens, case.d_out, dtype=dtype, device=device)

    def step(backend: str) -> None:
        torch.autograd.grad(getattr(ops, case.op)(**inputs, backend=backend), leaves, gy)

    best = dict.fromkeys(backends, math.inf)
    for _, backend in itertools.product(range(2), best):  # compile and warm up
        step(backend)
    steps: dict[str, Callable[[], None]] = {backend: functools.partial(step, backend) for backend in best}
    if device.type == "cuda":
        steps = {backend: _replayed(run, device) for backend, run in steps.items()}
    for _, backend in itertools.product(range(repeats), best):
        best[backend] = min(best[backend], _seconds(steps[backend], device) * 1e6)
    return best


def _replayed(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """What launches a graph of the kernels that ``run`` launches."""
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()  # what a stream allocates and looks up for itself must be there before the capture
        torch.cuda.synchronize(device)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            run()
    return graph.replay


def _able() -> list[str]:
    """Those of the rivals that run on the current GPU."""
    can_run = importlib.import_module("efft_kernels.backends").can_run
    return [backend for backend in RIVALS if can_run(backend, torch.empty(1, device="cuda")) is None]


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _origin(device: torch.device) -> str:
    try:
        from triton import __version__ as triton
    except ImportError:  # eager and cuda can be compared without it
        triton = "not installed"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    return f"measured on {name}, torch {torch.__version__}, triton {triton}, {time.strftime('%Y-%m-%d')}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: measure all combinations and add them to a table."""
    parser = argparse.ArgumentParser(prog="python -m efft_kernels.choice", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="table to add the rows to")
    parser.add_argument("--op", nargs="+", choices=OPS, default=["tt_linear"])
    for name in ("--tokens", "--d-in", "--d-out", "--rank"):
        parser.add_argument(name, nargs="+", type=int, required=True)
    parser.add_argument("--dtype", nargs="+", choices=("float16", "bfloat16", "float32"), default=["bfloat16"])
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no GPU to measure on (torch.cuda.is_available() is False)")
    capability = generation("cuda")
    rows = list(read(options.out)) if options.out.exists() else []
    rivals = _able()
    wanted = (options.op, options.tokens, options.d_in, options.d_out, options.rank, options.dtype)
    for values in itertools.product(*wanted):
        rows.append(measure(Case(*values, capability), "cuda", rivals))
        times = ", ".join(f"{backend} {us:.1f} us" for backend, us in rows[-1].microseconds.items())
        print(*values, times, flush=True)
        write(options.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
