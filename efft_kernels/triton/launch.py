"""Choose how the kernels are launched: the tile sizes, the precision and the device.

The main kernel computes Y = A B + bias + H T (:mod:`efft_kernels.triton.lowrank_gemm`). The number R of columns of H is
the rank. No table of tiles is specific to one GPU. Among the tiles whose pipeline fits the device's shared memory,
:func:`gemm_tile` chooses the one with the shortest modeled time for the shape. The *epilogue* of a kernel is its code
after the main loop, which finishes and stores the output tile. TMA is the copy engine of GPUs from compute capability
9.0 on.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from efft_kernels.measured import KERNELS

if triton.knobs.runtime.interpret:
    from efft_kernels.triton.interpreter import correct_bfloat16

    correct_bfloat16()


@dataclass(frozen=True)
class GemmTile:
    """Describe how the matrix product is split into programs.

    Attributes:
        m, n: rows and columns of the output tile.
        k: depth of one step of the main loop.
        warps: number of warps per program.
        stages: number of main loop steps in flight.
        speed: arithmetic rate on a fully occupied GPU, relative to the best tile. Small tiles are slower because they
            read their operands more often.
        capability: the lowest major compute capability on which the registers suffice. From 9 on, tensor cores read
            their operands from shared memory, which saves registers.
        slopes: the GELUs whose slope the epilogue can compute with the available registers, according to
            ``python -m tests.efft_kernels.triton.resource_report``.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    speed: float
    capability: int = 8
    slopes: tuple[str, ...] = ("gelu", "gelu_tanh")

    def shared_memory(self, element_size: int, *, tma: bool = False) -> int:
        """Return the bytes of the pipeline's buffers. With TMA, add half of the output tile and a few barriers."""
        staged = self.m * self.n // 2 * element_size + 256 if tma else 0
        return self.stages * (self.m + self.n) * self.k * element_size + staged


#: Tiles for half precision that published bf16 matrix products use on GPUs of compute capability 8.0 and newer. The
#: speeds are modeled, not measured.
HALF_TILES = (
    GemmTile(128, 256, 64, 8, 3, 1.0, capability=9, slopes=()),
    GemmTile(128, 128, 64, 8, 3, 0.9),
    GemmTile(128, 128, 32, 8, 3, 0.85),  # for 99 KiB of shared memory (sm_86, sm_89) and 64 KiB (AMD)
    GemmTile(64, 128, 32, 4, 3, 0.7),
    GemmTile(64, 64, 32, 4, 3, 0.5),
)
#: Tiles for the kernel with TMA. The speeds come from an H100 with bf16 and Triton 3.6, for the eight products of a
#: step of ViT-B's layers (12608 tokens, rank 32). The first tile takes 728 us, or 737 us with 3 stages and the output
#: stored in one piece. The second tile takes 775 us, or 808 us with 8 warps; its speed is the low end of the range 0.79
#: to 0.89. The speeds of the smaller tiles are modeled, not measured.
TMA_TILES = (
    GemmTile(128, 256, 64, 8, 4, 1.0, capability=9, slopes=("gelu",)),
    GemmTile(128, 128, 64, 4, 4, 0.8, capability=9, slopes=()),
    GemmTile(128, 128, 32, 8, 3, 0.75, capability=9, slopes=()),  # for 99 KiB of shared memory (sm_120)
    GemmTile(64, 128, 32, 4, 3, 0.6, capability=9),
    GemmTile(64, 64, 32, 4, 4, 0.45, capability=9),
)
#: Tiles for fp32 without tensor cores, where the accumulator uses most registers. The speeds are modeled too.
FP32_TILES = (GemmTile(32, 64, 16, 4, 2, 1.0, slopes=()), GemmTile(32, 32, 16, 4, 2, 0.7))
#: Tiles for fp32 that tensor cores round to TF32, if the user allows this in torch. The speeds are modeled too.
TF32_TILES = (GemmTile(128, 128, 32, 8, 3, 1.0, slopes=()), GemmTile(64, 64, 32, 4, 3, 0.5))

#: The largest number of columns of H in one step of the product H T. More would not fit the registers that the
#: accumulator leaves free.
TAIL_R = 32


@dataclass(frozen=True)
class Device:
    """Hold the device facts for choosing a tile: multiprocessors, bytes of shared memory, major compute capability."""

    processors: int
    shared_memory: int
    capability: int


@functools.cache
def device(of: torch.device) -> Device:
    """Return the facts about a GPU; in the interpreter, return those of an H100."""
    if of.type != "cuda":
        return Device(132, 232448, 9)
    properties: Any = torch.cuda.get_device_properties(of)  # some versions of torch do not declare all attributes
    capability = 8 if torch.version.hip else properties.major  # AMD uses a different numbering
    return Device(properties.multi_processor_count, properties.shared_memory_per_block_optin, capability)


def tiles(A: Tensor, *, tma: bool = False) -> Sequence[GemmTile]:
    """Return the table of tiles for a product in the precision of A."""
    return _table(A.element_size(), precision(A), tma)


def _table(element_size: int, precision: str, tma: bool) -> Sequence[GemmTile]:
    if element_size == 2:
        return TMA_TILES if tma else HALF_TILES
    return TF32_TILES if precision == "tf32" else FP32_TILES


def gemm_tile(A: Tensor, N: int, *, tma: bool = False, slope: str = "none") -> GemmTile:
    """Return the tile for A [M, K] or [samples, M, K] times [K, N].

    ``slope`` names the GELU whose slope the epilogue applies, or is "none". The chosen tile has the shortest modeled
    time: the number of waves of programs, times the tile size, divided by the tile's speed.
    """
    samples = A.shape[:-2].numel()
    return _best_tile(A.device, samples, A.shape[-2], N, A.element_size(), precision(A), tma, slope)


@functools.lru_cache(maxsize=4096)
def _best_tile(
    on: torch.device, samples: int, M: int, N: int, element_size: int, precision: str, tma: bool, slope: str
) -> GemmTile:
    """Compute the result of :func:`gemm_tile`, and cache it, because the computation takes longer than a launch."""
    gpu, table = device(on), _table(element_size, precision, tma)

    def time(tile: GemmTile) -> float:
        programs = samples * ceil_div(M, tile.m) * ceil_div(N, tile.n)
        return ceil_div(programs, gpu.processors) * tile.m * tile.n / tile.speed

    fitting = [
        t
        for t in table
        if t.shared_memory(element_size, tma=tma) <= gpu.shared_memory
        and t.capability <= gpu.capability
        and slope in ("none", *t.slopes)
    ]
    return min(fitting or table[-1:], key=time)


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up. Outside of a kernel, ``triton.cdiv`` takes several microseconds for this."""
    return -(-a // b)


@functools.cache
def rank_block(R: int) -> int:
    """Return how many columns of H a kernel processes at once: a power of two from 16 (for tensor cores) to 64."""
    return min(max(1 << (R - 1).bit_length(), 16), 64)


def tail_block(R: int) -> int:
    """Return how many columns of H one step of the product H T processes.

    All steps together process R columns, rounded up to a multiple of this number. With the environment variable
    ``EFFT_SM90_GENERATION`` set to 2 or 3, the rounding is only to a multiple of 16. These settings have not run on a
    GPU yet and are therefore not the default. Without them, up to 16 more columns may be processed.
    """
    if KERNELS > 1 and R > TAIL_R and ceil_div(R, 16) % 2:
        return 16
    return min(rank_block(R), TAIL_R)


def precision(A: Tensor) -> str:
    """Return the precision of products: "tf32" for fp32 if the user allows it for torch's products, else "ieee"."""
    fp32 = A.dtype == torch.float32
    return "tf32" if fp32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context that launches kernels on the tensor's GPU, even if another GPU is the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
