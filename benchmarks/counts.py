"""Count FLOPs and bytes by formula, and measure the peak speed of the machine.

The formulas count the work of one adapted linear layer: y = x Wᵀ + b + h G with h = x D, and the gradients dx, dD and
dG. W and b are frozen, and D and G are the factors of the update. gy is the gradient with respect to y. The backward
pass also computes dh = gy Gᵀ. Additional work of an implementation, such as building a dense update, does not count.
The frozen baseline ("floor") computes only y = x Wᵀ + b and dx = gy W.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.timing import time_rows


@dataclass(frozen=True)
class Work:
    """Hold the least possible number of floating-point operations and of bytes read from and written to memory.

    A multiply-add counts as two operations.
    """

    flops: int
    bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Sizes:
    """Hold the sizes of one layer call; ``width`` is the size of an element of x, y and W in bytes."""

    tokens: int
    d_in: int
    d_out: int
    rank: int
    width: int

    def floor(self, phase: str) -> Work:
        """Return the work of the frozen layer: y in phase ``fwd``, dx in ``bwd``, and both in ``fwd_bwd``."""
        flops = 2 * self.tokens * self.d_in * self.d_out
        activations = self.tokens * (self.d_in + self.d_out)
        weight = self.d_in * self.d_out
        forward = Work(flops, self.width * (activations + weight + self.d_out))
        backward = Work(flops, self.width * (activations + weight))
        return _of_phase(phase, forward, backward)

    def delta(self, phase: str) -> Work:
        """Return the additional work of the low-rank update.

        The forward pass computes h and h G, and the backward pass computes dh, dh Dᵀ, dD and dG. The factors are in
        fp32. The forward pass writes h, and the backward pass reads h. The backward pass also reads x, which dD needs
        and the frozen layer does not. The formula assumes that y, gy and dx are still in fast memory when the
        computation of the update needs them.
        """
        pair = 2 * self.tokens * self.rank * (self.d_in + self.d_out)
        h = self.tokens * self.rank * self.width
        factors = 4 * self.rank * (self.d_in + self.d_out)
        x = self.tokens * self.d_in * self.width
        return _of_phase(phase, Work(pair, h + factors), Work(2 * pair, x + h + 2 * factors))

    def limit(self, phase: str) -> float:
        """Return the arithmetic limit: all FLOPs divided by the baseline's FLOPs.

        At equal FLOP/s, this is the lowest possible ratio of the layer's time to the baseline's time.
        """
        floor = self.floor(phase).flops
        return (floor + self.delta(phase).flops) / floor


@dataclass(frozen=True)
class Peaks:
    """Hold the measured peak speeds of the machine.

    ``flops_per_s`` is the speed of a large matrix product. ``bytes_per_s`` is the speed of a large copy, in which both
    reads and writes count.
    """

    flops_per_s: float
    bytes_per_s: float


def measure_peaks(device: torch.device | str, dtype: torch.dtype, seconds: float = 0.5) -> Peaks:
    """Repeat a square matrix product and a copy for ``seconds`` each, and return the highest speeds."""
    cuda = torch.device(device).type == "cuda"
    n, length = (8192, 2**29) if cuda else (1024, 2**26)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = _best(lambda: a @ b, device, seconds)
    copy = _best(lambda: target.copy_(source), device, seconds)
    return Peaks(2 * n**3 / product, 2 * length / copy)


def _best(run: Callable[[], object], device: torch.device | str, seconds: float) -> float:
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, *time_rows({"": run}, repeats=3, warmup=1, device=device)[""])
    return best


def _of_phase(phase: str, forward: Work, backward: Work) -> Work:
    return {"fwd": forward, "bwd": backward, "fwd_bwd": forward + backward}[phase]
