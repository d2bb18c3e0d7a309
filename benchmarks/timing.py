"""Time several implementations (rows) in turn within each repetition, so that a disturbance affects all equally."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

#: The seconds of every repetition, by row.
Samples = dict[str, list[float]]
#: Bytes written between two measurements to empty the L2 cache; several times the cache size of current GPUs.
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

    Args:
        rows: functions to time, by name.
        repeats: number of samples per row.
        warmup: number of rounds before the first sample, which are not measured; they compile and allocate.
        device: device of the rows. On a CPU the wall clock is used, on CUDA events around each call.
        flush_l2: CUDA only: overwrite the L2 cache before each sample (cold). Otherwise the row runs once without
            measurement before each sample (warm). In both cases the host can queue the row before the device is free.
        cuda_graphs: CUDA only: capture each row in a graph and measure the replay, which excludes the launch cost.
    """
    if torch.device(device).type != "cuda":
        for _ in range(warmup):
            for run in rows.values():
                run()
        return _rounds(rows, repeats, _wall_clock)

    if cuda_graphs:
        rows = {name: Captured.of(run, warmup) for name, run in rows.items()}
    with _side_stream():
        for _ in range(warmup):
            for run in rows.values():
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

        return _rounds(rows, repeats, events)


@dataclass(frozen=True)
class Captured:
    """Replay a captured CUDA graph when called.

    Attributes:
        run: the captured call, which owns the tensors that the graph reads and writes.
        graph: the kernels of the call.
    """

    run: Callable[[], object]
    graph: torch.cuda.CUDAGraph

    @classmethod
    def of(cls, run: Callable[[], object], warmup: int = 2, pool: Any = None) -> Captured:
        """Capture ``run`` after ``warmup`` calls.

        ``pool`` is the memory pool of another graph (``graph.pool()``) that both graphs then share. Sharing is safe if
        each call frees all its allocations. A capture that fails may leave the pool in use.

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
                cause = error.__context__ or error  # the end of the capture then fails too
                raise RuntimeError(f"a CUDA graph cannot capture the call: {cause}") from error
        return cls(run, graph)

    def __call__(self) -> None:
        self.graph.replay()


def ratios(samples: Samples, floor: str = "floor") -> Samples:
    """Return every sample divided by the sample of the row ``floor`` (the frozen baseline) in the same repetition."""
    return {
        name: [t / base for t, base in zip(seconds, samples[floor], strict=True)] for name, seconds in samples.items()
    }


def _rounds(
    rows: Mapping[str, Callable[[], object]], repeats: int, measure: Callable[[Callable[[], object]], float]
) -> Samples:
    samples: Samples = {name: [] for name in rows}
    for _ in range(repeats):
        for name, run in rows.items():
            samples[name].append(measure(run))
    return samples


def _wall_clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@functools.cache
def _stream() -> torch.cuda.Stream:
    """Return one stream for all rows, since the vendor's library keeps a workspace per stream."""
    return torch.cuda.Stream()


def _side_stream() -> AbstractContextManager[object]:
    """Return a context on another stream, because a capture must not use or wait for the default stream."""
    _stream().wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(_stream())
