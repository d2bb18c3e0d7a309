"""Time several implementations, called rows.

Every repetition measures all rows in turn. A disturbance of the machine therefore affects all rows about equally.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

#: The name of a row, of any type that can be the key of a dictionary.
Name = TypeVar("Name")
#: For each row, the list of its measured times in seconds, one per repetition.
Samples = dict[str, list[float]]
#: Number of bytes to write before a measurement in order to empty the L2 cache. The caches of current GPUs are smaller.
_FLUSH_BYTES = 512 * 2**20


def time_rows(
    rows: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 2,
    device: torch.device | str = "cpu",
    flush_l2: bool = False,
    cuda_graphs: bool = False,
) -> Samples:
    """Return the seconds of every row, measured in ``repeats`` rounds over all rows.

    ``repeats`` is the number of samples per row. :func:`sampler` explains the other arguments.

    Raises:
        RuntimeError: a row cannot be captured in a CUDA graph.
    """
    measure = sampler(rows, warmup, device, flush_l2, cuda_graphs)
    rounds = [measure() for _ in range(repeats)]
    return {name: [seconds[name] for seconds in rounds] for name in rows}


def sampler(
    rows: Mapping[Name, Callable[[], object]],
    warmup: int = 2,
    device: torch.device | str = "cpu",
    flush_l2: bool = False,
    cuda_graphs: bool = False,
) -> Callable[[], dict[Name, float]]:
    """Warm up the rows, and return a function that measures every row once and returns the seconds.

    On a CPU the times come from the wall clock. On a GPU they come from CUDA events before and after each call.

    Args:
        rows: functions to time, by name.
        warmup: number of unmeasured rounds before the first sample, in which kernels are compiled and memory is
            allocated. With ``cuda_graphs``, each row also runs this often before its capture.
        device: device on which the rows compute.
        flush_l2: whether to overwrite the L2 cache before each sample (a cold cache). Otherwise the row runs once
            without measurement before each sample (a warm cache). In both cases the GPU is still busy when the host
            launches the measured call, which hides launch time. Ignored on a CPU.
        cuda_graphs: whether to capture each row in a CUDA graph and to measure the replay of the graph, which excludes
            the launch time. Ignored on a CPU.

    Raises:
        RuntimeError: a row cannot be captured in a CUDA graph.
    """
    if torch.device(device).type != "cuda":
        for _ in range(warmup):
            for run in rows.values():
                run()
        return lambda: {name: _wall_clock(run) for name, run in rows.items()}

    runs = {name: Captured.of(run, warmup) if cuda_graphs else run for name, run in rows.items()}
    with _side_stream():
        for _ in range(warmup):
            for run in runs.values():
                run()
        torch.cuda.synchronize()
        scratch = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device) if flush_l2 else None

    def events(run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if scratch is None:
            run()
        else:
            scratch.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def measure() -> dict[Name, float]:
        with _side_stream():
            return {name: events(run) for name, run in runs.items()}

    return measure


@dataclass(frozen=True)
class Captured:
    """Replay a captured CUDA graph when called.

    Attributes:
        run: the captured function. It must stay alive, because it owns tensors that the graph reads and writes.
        graph: the graph to replay.
    """

    run: Callable[[], object]
    graph: torch.cuda.CUDAGraph

    @classmethod
    def of(cls, run: Callable[[], object], warmup: int = 2, pool: Any = None) -> Captured:
        """Call ``run`` ``warmup`` times and then capture one more call in a graph.

        Args:
            run: the function to capture.
            warmup: number of calls before the capture.
            pool: memory pool of another graph (``graph.pool()``), which the new graph then shares. Sharing is safe if
                each call frees all memory that it allocates and replays never overlap. Do not use the pool again after
                a failed capture.

        Raises:
            RuntimeError: ``run`` contains an operation that no graph can capture, such as waiting for the device.
        """
        graph = torch.cuda.CUDAGraph()
        with _side_stream():
            for _ in range(warmup):
                run()
            try:
                with torch.cuda.graph(graph, pool, _stream()):
                    run()
            except RuntimeError as error:
                # If ``run`` fails, the end of the capture also fails, with the first error as its context.
                cause = error.__context__ or error
                raise RuntimeError(f"a CUDA graph cannot capture the call: {cause}") from error
        return cls(run, graph)

    def __call__(self) -> None:
        self.graph.replay()


def ratios(samples: Samples, floor: str = "floor") -> Samples:
    """Divide every sample by the sample that another row, the baseline, has in the same repetition.

    ``floor`` is the name of the baseline. The row named "floor" is the frozen layer or model without an update.
    """
    return {
        name: [t / base for t, base in zip(seconds, samples[floor], strict=True)] for name, seconds in samples.items()
    }


def _wall_clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@functools.cache
def _stream() -> torch.cuda.Stream:
    """Return the stream on which all rows run. They share it, because cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream()


def _side_stream() -> AbstractContextManager[object]:
    """Return a context in which :func:`_stream` is the current stream, because the default stream cannot be captured.

    The stream first waits for the work that is queued on the stream that is current now.
    """
    _stream().wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(_stream())
