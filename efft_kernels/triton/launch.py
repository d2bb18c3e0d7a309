"""How the kernels are launched: tile sizes and where they come from, precision, the device.

No table names a GPU. A tile is taken if its pipeline fits the shared memory that the device reports, and of those the
one that the model below expects to be fastest for the shape.
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
    """How a program of the matrix product is cut.

    Attributes:
        m, n, k: rows and columns of the output tile, depth of a step of the main loop.
        warps, stages: warps of a program, steps of the main loop in flight.
        speed: arithmetic rate of a full GPU relative to the best tile: small tiles read their operands more often.
        capability: least compute capability that has the registers for it (tensor cores that read shared memory).
        slopes: GELUs for whose slope the epilogue has the registers (the resource report tells).
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    speed: float
    capability: int = 8
    slopes: tuple[str, ...] = ("gelu", "gelu_tanh")

    def shared_memory(self, element_size: int, rank: int = 0, *, tma: bool = False) -> int:
        """Bytes of the pipeline's buffers; ``rank`` columns of fp32 factors ride along where H is recomputed.

        With TMA half of the output tile is staged there too, with a few barriers.
        """
        staged = self.m * self.n // 2 * element_size + 256 if tma else 0
        return self.stages * ((self.m + self.n) * self.k * element_size + rank * self.k * 4) + staged


#: Origin: tiles that public bf16 GEMMs use on these architectures, their speeds modelled, not measured.
HALF_TILES = (
    GemmTile(128, 256, 64, 8, 3, 1.0, capability=9, slopes=()),
    GemmTile(128, 128, 64, 8, 3, 0.9),
    GemmTile(128, 128, 32, 8, 3, 0.85),  # for 99 KiB of shared memory (sm_86, sm_89) and 64 KiB (AMD)
    GemmTile(64, 128, 32, 4, 3, 0.7),
    GemmTile(64, 64, 32, 4, 3, 0.5),
)
#: With TMA. Origin: an H100, bf16, Triton 3.6; the eight products of a step of ViT-B's layers (12608 tokens, rank 32)
#: take 728 us with the first, 737 us with 3 stages and the output in one piece, 775 us with the second (808 us with 8
#: warps), whose speed is the low end of 0.79 to 0.89. Speeds of the smaller tiles are modelled, not measured.
TMA_TILES = (
    GemmTile(128, 256, 64, 8, 4, 1.0, capability=9, slopes=("gelu",)),
    GemmTile(128, 128, 64, 4, 4, 0.8, capability=9, slopes=()),
    GemmTile(128, 128, 32, 8, 3, 0.75, capability=9, slopes=()),  # for 99 KiB of shared memory (sm_120)
    GemmTile(64, 128, 32, 4, 3, 0.6, capability=9),
    GemmTile(64, 64, 32, 4, 4, 0.45, capability=9),
)
#: fp32 without tensor cores: the accumulator is what registers are for. Modelled likewise.
FP32_TILES = (GemmTile(32, 64, 16, 4, 2, 1.0, slopes=()), GemmTile(32, 32, 16, 4, 2, 0.7))
#: fp32 rounded to TF32 on the way into the tensor cores, by the user's choice in torch. Modelled likewise.
TF32_TILES = (GemmTile(128, 128, 32, 8, 3, 1.0, slopes=()), GemmTile(64, 64, 32, 4, 3, 0.5))

#: Up to this rank a program has the registers to recompute H in its main loop, which only the kernel without TMA does.
RECOMPUTE_RANK = 32
#: Up to this N times rank it pays: each block of 256 columns adds rank / 256 of the product's arithmetic, a kernel of
#: its own reads A again. Equal at N · rank = 256 · (790e12 FLOP/s) / (4.3e12 bytes/s) on an H200. Modelled.
RECOMPUTE_WORK = 48 * 1024


#: Ranks that the tail of the split form takes at once: registers beside a full accumulator are few.
TAIL_R = 32


@dataclass(frozen=True)
class Device:
    """What the choice of a tile depends on: multiprocessors, bytes of shared memory, compute capability."""

    processors: int
    shared_memory: int
    capability: int


@functools.cache
def device(of: torch.device) -> Device:
    """The facts of a GPU; those of an H100 in the interpreter."""
    if of.type != "cuda":
        return Device(132, 232448, 9)
    properties: Any = torch.cuda.get_device_properties(of)  # not all that it has is declared in every torch
    capability = 8 if torch.version.hip else properties.major  # AMD counts its own way
    return Device(properties.multi_processor_count, properties.shared_memory_per_block_optin, capability)


def tiles(A: Tensor, *, tma: bool = False) -> Sequence[GemmTile]:
    """The table for a product in A's precision."""
    if A.element_size() == 2:
        return TMA_TILES if tma else HALF_TILES
    return TF32_TILES if precision(A) == "tf32" else FP32_TILES


def gemm_tile(A: Tensor, N: int, rank: int, *, tma: bool = False, slope: str = "none") -> GemmTile:
    """The tile for [M, K] (a sample of several) times [K, N], with ``rank`` columns of H recomputed (0: none), and the
    ``slope`` of a GELU in its epilogue.

    Modelled time: whole waves of programs, each as long as its tile is big, over the tile's speed.
    """
    gpu, samples = device(A.device), A.shape[:-2].numel()

    def time(tile: GemmTile) -> float:
        programs = samples * triton.cdiv(A.shape[-2], tile.m) * triton.cdiv(N, tile.n)
        return triton.cdiv(programs, gpu.processors) * tile.m * (tile.n + rank) / tile.speed

    fitting = [
        t
        for t in tiles(A, tma=tma)
        if t.shared_memory(A.element_size(), rank, tma=tma) <= gpu.shared_memory
        and t.capability <= gpu.capability
        and slope in ("none", *t.slopes)
    ]
    return min(fitting or tiles(A, tma=tma)[-1:], key=time)


def recomputes(A: Tensor, R: int, N: int) -> bool:
    """Whether H is made in the main loop of a product without TMA, of N columns, rather than by a kernel of its own.

    Never from compute capability 9.0 on: there the two biggest tiles gave wrong results (an H100, Triton 3.6).
    """
    return device(A.device).capability < 9 and R <= RECOMPUTE_RANK and N * rank_block(R) <= RECOMPUTE_WORK


def rank_block(R: int) -> int:
    """The rank as the kernels see it: a power of two, at least the 16 that a tensor core takes, at most 64 at once."""
    return min(max(triton.next_power_of_2(R), 16), 64)


def precision(A: Tensor) -> str:
    """Of products of fp32 tiles: TF32 only where the user chose it for torch's own products on GPUs."""
    fp32 = A.dtype == torch.float32
    return "tf32" if fp32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launches inside the ``with`` block go to the tensor's GPU, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
