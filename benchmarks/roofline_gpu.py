"""Predict the time of one kernel on a GPU from its FLOPs and bytes.

The time of a kernel is a fixed time plus the time of its work. The latter is the larger of two quotients: FLOPs divided
by the peak FLOP/s, and bytes divided by the bandwidth. For large matrix products the model also counts whole tiles,
waves (each multiprocessor computes one tile at a time), and steps along k, the inner dimension. One constant is chosen
so that the predicted product of two matrices of 8192 x 8192 runs at the peak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Machine:
    """Hold the properties of a GPU that the model uses; the defaults describe an H200.

    The defaults of ``bandwidth``, ``fixed`` and ``own`` come from the constants that :mod:`benchmarks.steps` fits to
    the recorded medians of an H200. In that module ``fixed`` is called ``launch``, and its constant ``own`` is a ratio
    of times, the reciprocal of the ratio of speeds here.

    Attributes:
        flops: peak of a large bf16 product, in FLOP/s.
        bandwidth: bandwidth of kernels that are limited by memory (reads plus writes), in bytes/s.
        multiprocessors: number of tiles that run at the same time.
        fixed: time of a kernel in addition to its work, in microseconds.
        own: speed of this library's product kernels, relative to the product kernels of the vendor (cuBLAS).
        tiled: whether products are counted in whole tiles; if False, products of every shape run at peak.
    """

    flops: float = 790e12
    bandwidth: float = 4.24e12
    multiprocessors: int = 132
    fixed: float = 3.2
    own: float = 0.91
    tiled: bool = True

    def __str__(self) -> str:
        products = "in whole tiles" if self.tiled else "at peak for every shape"
        return (
            f"{self.flops / 1e12:.0f} TFLOP/s, {self.bandwidth / 1e12:.1f} TB/s, {self.fixed:g} us per kernel, "
            f"own products at {self.own:g} of the vendor's, products {products}"
        )

    def memory(self, n_bytes: float, flops: float = 0.0) -> float:
        """Return the time in microseconds of a kernel that is not a large product.

        The kernel moves ``n_bytes`` at the bandwidth and computes ``flops`` at 30 % of the peak. The slower of the two
        determines the time.
        """
        return self.fixed + 1e6 * max(n_bytes / self.bandwidth, flops / (0.3 * self.flops))

    def product(self, m: int, n: int, k: int, *, relative: float = 1.0, tail: int = 0) -> float:
        """Return the time of ``[m, k] @ [k, n]`` in microseconds.

        Args:
            m, n, k: sizes of the product.
            relative: speed relative to the vendor's product.
            tail: additional steps along k, in elements, whose operands are so small that their bytes do not count.
        """
        n_bytes = 2 * (m * k + k * n + m * n)
        if self.tiled:
            work = _tiles(m, n, math.ceil(k / _K_STEP) + tail / _K_STEP, self._main_loop, self)
        else:
            work = 2e6 * m * n * (k + tail) / self.flops
        return self.fixed + max(work / relative, 1e6 * n_bytes / self.bandwidth)

    def skinny(self, m: int, n: int, k: int) -> float:
        """Return the time in microseconds of a product in which one size is the rank."""
        return self.memory(2 * (m * k + k * n + m * n), 2 * m * n * k)

    @cached_property
    def _main_loop(self) -> float:
        """Return the FLOP/s inside the main loop for which a product of 8192 x 8192 matrices runs at peak."""
        n = 8192
        return self.flops * _tiles(n, n, n / _K_STEP, self.flops, self) / (2e6 * n**3 / self.flops)


_K_STEP = 64
_LARGEST_TILE = 40960
_TILES = [(m, n) for m in (64, 128, 192, 256) for n in range(64, 257, 16) if m * n <= _LARGEST_TILE]
_LONG_K = 4096  # if k is at least this large, several tiles may share the sum along k


def _tiles(m: int, n: int, k_steps: float, flops: float, machine: Machine) -> float:
    """Return the microseconds of ``[m, k] @ [k, n]`` with the best tile size, where k is ``k_steps`` times _K_STEP."""
    best = math.inf
    for tile_m, tile_n in _TILES:
        # Small tiles reuse their operands less often than tiles of 128 x 256 and are therefore slower. Half of the time
        # that a tile needs to write its 2-byte results is not hidden behind the main loop.
        reuse = min(1.0, tile_m * tile_n / (tile_m + tile_n) / (128 * 256 / 384)) ** 0.5
        rate = flops * reuse / machine.multiprocessors
        epilogue = tile_m * tile_n * machine.multiprocessors / machine.bandwidth
        for split in (1,) if k_steps * _K_STEP < _LONG_K else (1, 2, 3, 4, 5, 6, 8):
            waves = math.ceil(split * math.ceil(m / tile_m) * math.ceil(n / tile_n) / machine.multiprocessors)
            steps = k_steps if split == 1 else math.ceil(k_steps / split)
            seconds = waves * (2 * tile_m * tile_n * steps * _K_STEP / rate + epilogue)
            if split > 1:
                seconds += 8 * m * n * split / machine.bandwidth
            best = min(best, seconds)
    return 1e6 * best
