"""How the kernels are launched: tile sizes and where they come from, precision, the device.

No table names a GPU. Of the tiles whose pipeline fits the shared memory that the device reports, :func:`gemm_tile`
takes the one that its model expects to be the fastest for the shape.
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

if triton.knobs.runtime.interpret:
    from efft_kernels.triton.interpreter import correct_bfloat16

    correct_bfloat16()


@dataclass(frozen=True)
class GemmTile:
    """How the matrix product is cut into programs.

    Attributes:
        m, n, k: rows and columns of the output tile, depth of a step of the main loop.
        warps, stages: warps of a program, steps of the main loop in flight.
        speed: arithmetic rate of a full GPU relative to the best tile: small tiles read their operands more often.
        capability: the least compute capability on which the registers suffice (tensor cores read shared memory there).
        slopes: the GELUs for whose slope the epilogue has enough registers, by the resource report.
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
        """Bytes of the pipeline's buffers and, with TMA, of half of the output tile and a few barriers."""
        staged = self.m * self.n // 2 * element_size + 256 if tma else 0
        return self.stages * (self.m + self.n) * self.k * element_size + staged


#: Origin: tiles that public bf16 GEMMs use on these architectures, their speeds modeled, not measured.
HALF_TILES = (
    GemmTile(128, 256, 64, 8, 3, 1.0, capability=9, slopes=()),
    GemmTile(128, 128, 64, 8, 3, 0.9),
    GemmTile(128, 128, 32, 8, 3, 0.85),  # for 99 KiB of shared memory (sm_86, sm_89) and 64 KiB (AMD)
    GemmTile(64, 128, 32, 4, 3, 0.7),
    GemmTile(64, 64, 32, 4, 3, 0.5),
)
#: With TMA. Origin: an H100, bf16, Triton 3.6; the eight products of a step of ViT-B's layers (12608 tokens, rank 32)
#: take 728 us with the first, 737 us with 3 stages and the output in one piece, 775 us with the second (808 us with 8
#: warps), whose speed is the low end of 0.79 to 0.89. Speeds of the smaller tiles are modeled, not measured.
TMA_TILES = (
    GemmTile(128, 256, 64, 8, 4, 1.0, capability=9, slopes=("gelu",)),
    GemmTile(128, 128, 64, 4, 4, 0.8, capability=9, slopes=()),
    GemmTile(128, 128, 32, 8, 3, 0.75, capability=9, slopes=()),  # for 99 KiB of shared memory (sm_120)
    GemmTile(64, 128, 32, 4, 3, 0.6, capability=9),
    GemmTile(64, 64, 32, 4, 4, 0.45, capability=9),
)
#: fp32 without tensor cores: the accumulator is what registers are for. Modeled likewise.
FP32_TILES = (GemmTile(32, 64, 16, 4, 2, 1.0, slopes=()), GemmTile(32, 32, 16, 4, 2, 0.7))
#: fp32 rounded to TF32 on the way into the tensor cores, by the user's choice in torch. Modeled likewise.
TF32_TILES = (GemmTile(128, 128, 32, 8, 3, 1.0, slopes=()), GemmTile(64, 64, 32, 4, 3, 0.5))

#: Columns of H that the tail of the product takes at once: few registers are left beside a full accumulator.
TAIL_R = 32


@dataclass(frozen=True)
class Device:
    """What the choice of a tile depends on: multiprocessors, bytes of shared memory, compute capability."""

    processors: int
    shared_memory: int
    capability: int


@functools.cache
def device(of: torch.device) -> Device:
    """The facts about a GPU; in the interpreter, those about an H100."""
    if of.type != "cuda":
        return Device(132, 232448, 9)
    properties: Any = torch.cuda.get_device_properties(of)  # not every torch declares all of its attributes
    capability = 8 if torch.version.hip else properties.major  # AMD numbers its GPUs in another way
    return Device(properties.multi_processor_count, properties.shared_memory_per_block_optin, capability)


def tiles(A: Tensor, *, tma: bool = False) -> Sequence[GemmTile]:
    """The table for a product in the precision of A."""
    if A.element_size() == 2:
        return TMA_TILES if tma else HALF_TILES
    return TF32_TILES if precision(A) == "tf32" else FP32_TILES


def gemm_tile(A: Tensor, N: int, *, tma: bool = False, slope: str = "none") -> GemmTile:
    """The tile for A [M, K] or [samples, M, K] times [K, N], with the ``slope`` of a GELU in its epilogue or "none".

    It is the one of the least modeled time: the number of waves of programs, times the size of the tile, over its
    speed.
    """
    gpu, samples = device(A.device), A.shape[:-2].numel()

    def time(tile: GemmTile) -> float:
        programs = samples * triton.cdiv(A.shape[-2], tile.m) * triton.cdiv(N, tile.n)
        return triton.cdiv(programs, gpu.processors) * tile.m * tile.n / tile.speed

    fitting = [
        t
        for t in tiles(A, tma=tma)
        if t.shared_memory(A.element_size(), tma=tma) <= gpu.shared_memory
        and t.capability <= gpu.capability
        and slope in ("none", *t.slopes)
    ]
    return min(fitting or tiles(A, tma=tma)[-1:], key=time)


def rank_block(R: int) -> int:
    """The columns of H that a kernel takes at once: a power of two from 16, which a tensor core needs, to 64."""
    return min(max(triton.next_power_of_2(R), 16), 64)


def precision(A: Tensor) -> str:
    """The precision of products: "tf32" for fp32 where the user chose it for torch's own products, else "ieee"."""
    fp32 = A.dtype == torch.float32
    return "tf32" if fp32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which kernels are launched on the tensor's GPU, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
