"""Measure which backend is fastest on this GPU, and store the times in a table (:mod:`efft_kernels.measured`).

    python -m efft_kernels.autotune --out measured.json --tokens 12608 --d-in 768 --d-out 2304 768 3072 --rank 16 32

A *case* is an op with its sizes, its dtype and the GPU's compute capability. A *row* of the table contains the times of
all compared backends for one case.

If the environment variable ``EFFT_AUTOTUNE`` names a file, importing :mod:`efft_kernels` activates this module. The
backend ``auto`` then measures a case when it first occurs and stores the row in that file. A case is not measured if
the file or the table in the package has a row with the same widths (d_in and d_out), a number of tokens that differs by
at most a factor of two, and an equivalent op, dtype, rank and GPU (:func:`efft_kernels.measured.nearest`). If two rows
are equally similar to a case, the row of the file is used.

Two measurements of a case may differ, and the backends round differently. Therefore nothing is measured under
``torch.use_deterministic_algorithms(True)``, and only existing rows are used.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from efft_kernels import ops
from efft_kernels.backends import can_run
from efft_kernels.measured import KERNELS, Case, Row, generation, plug_in, read, write

#: Ops that have fused kernels to compare with the vendor's products.
OPS = ("tt_linear", "tt_gelu_linear", "tt_norm_linear")
#: The backends to compare: the vendor's products and the fused kernels.
RIVALS = ("eager", "triton", "cuda")


@dataclass(frozen=True)
class Autotuner:
    """Measure cases when they first occur, and add them to the table ``path``."""

    path: Path

    def can_measure(self, device: torch.device) -> bool:
        """Return whether a case can be measured now.

        This is not possible in compiled code, while a CUDA graph is captured, and if torch must be deterministic.
        """
        traced = torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
        return not traced and not torch.are_deterministic_algorithms_enabled()

    def measure(self, case: Case, device: torch.device, backends: Sequence[str]) -> Row:
        """Measure ``case``, add the row to the table, and return the row."""
        row = measure(case, device, backends)
        write(self.path, [*(read(self.path) if self.path.exists() else ()), row])
        return row


def use_table(path: Path) -> None:
    """Make ``auto`` use the rows of the table ``path`` too, and measure cases to which no row applies.

    Raises:
        ValueError: the file exists and does not contain a table.
    """
    plug_in(Autotuner(path), read(path) if path.exists() else ())


def measure(case: Case, device: torch.device | str, backends: Sequence[str] = RIVALS, repeats: int = 20) -> Row:
    """Time a forward and backward pass of ``case`` with each backend, and return the best times of ``repeats`` runs.

    The backends take turns. On a GPU, the kernels are replayed as a CUDA graph, so the time of the host is excluded.
    This matches training, in which the host runs ahead of the GPU.
    """
    device = torch.device(device)
    with contextlib.ExitStack() as around:  # isolates the measurement from the caller's autograd state and device
        around.enter_context(torch.inference_mode(False))
        around.enter_context(torch.enable_grad())
        around.enter_context(torch.autograd.graph.saved_tensors_hooks(_identity, _identity))
        if device.type == "cuda":
            around.enter_context(torch.cuda.device(device))
        return Row(case, _microseconds(case, device, backends, repeats), _origin(device), KERNELS)


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _microseconds(case: Case, device: torch.device, backends: Sequence[str], repeats: int) -> dict[str, float]:
    inputs, dtype = _inputs(case, device), getattr(torch, case.dtype)
    leaves = [inputs[name].requires_grad_() for name in (next(iter(inputs)), "D", "G")]
    gy = torch.ones(case.tokens, case.d_out, dtype=dtype, device=device)

    def step(backend: str) -> None:
        torch.autograd.grad(getattr(ops, case.op)(**inputs, backend=backend), leaves, gy)

    best = dict.fromkeys(backends, math.inf)
    for _, backend in itertools.product(range(2), best):  # compile and warm up
        step(backend)
    steps: dict[str, Callable[[], None]] = {backend: functools.partial(step, backend) for backend in best}
    if device.type == "cuda":
        steps = {backend: _replay_of(run, device) for backend, run in steps.items()}
    for _, backend in itertools.product(range(repeats), best):
        best[backend] = min(best[backend], _seconds(steps[backend], device) * 1e6)
    return best


def _inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """Return the arguments of the op by name, with the layer's input first. Factors are in fp32, as in training.

    The values come from a separate generator, because a measurement must not advance the caller's generator.
    """
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (std * torch.randn(shape, generator=generator, device=device)).to(dtype)

    inputs = {"z" if case.op == "tt_gelu_linear" else "x": normal(case.tokens, case.d_in)}
    if case.op == "tt_norm_linear":
        inputs |= {"gamma": normal(case.d_in), "beta": normal(case.d_in)}
    return {
        **inputs,
        "W": normal(case.d_out, case.d_in, std=case.d_in**-0.5),
        "b": normal(case.d_out),
        "D": normal(case.d_in, case.r1, std=case.d_in**-0.5, dtype=torch.float32),
        "G": normal(case.r1, case.d_out, std=case.r1**-0.5, dtype=torch.float32),
    }


def _replay_of(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Return a function that launches the kernels of ``run`` as one CUDA graph."""
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()  # a stream's own allocations and look-ups must happen before the capture
        torch.cuda.synchronize(device)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            run()
    return graph.replay


def _rivals() -> list[str]:
    """Return those of :data:`RIVALS` that can run on the current GPU."""
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
    except ImportError:  # eager and cuda can be compared without triton
        triton = "not installed"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    return f"measured on {name}, torch {torch.__version__}, triton {triton}, {time.strftime('%Y-%m-%d')}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: measure every combination of the options, and add the rows to a table."""
    parser = argparse.ArgumentParser(prog="python -m efft_kernels.autotune", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="table to which the rows are added")
    parser.add_argument("--op", nargs="+", choices=OPS, default=["tt_linear"])
    for name in ("--tokens", "--d-in", "--d-out", "--rank"):
        parser.add_argument(name, nargs="+", type=int, required=True)
    parser.add_argument("--dtype", nargs="+", choices=("float16", "bfloat16", "float32"), default=["bfloat16"])
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no GPU to measure on (torch.cuda.is_available() is False)")
    capability = generation("cuda")
    rows = list(read(options.out)) if options.out.exists() else []
    rivals = _rivals()
    combinations = (options.op, options.tokens, options.d_in, options.d_out, options.rank, options.dtype)
    for values in itertools.product(*combinations):
        rows.append(measure(Case(*values, capability), "cuda", rivals))
        times = ", ".join(f"{backend} {us:.1f} us" for backend, us in rows[-1].microseconds.items())
        print(*values, times, flush=True)
        write(options.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
