"""Run one forward and one backward call of several layers in the CUDA emulator, and print the launches.

Usage: ``python block.py LIBRARY TOKENS RANK PACKED D_IN D_OUT [D_IN D_OUT ...]``. LIBRARY is a library that build.py
in this folder has built, and every pair of D_IN and D_OUT is one layer. PACKED is 1 if the factors D and G are packed
before the calls (copied to the type and layout that the kernels read, see efft_kernels/_packed.py), or else 0.

Each printed line is JSON: the number of the layer, "fwd" or "bwd", and a list with [kernel, cluster, dependent, bytes]
for each launch. ``kernel`` is the distance in bytes from the start of the library to the kernel's code. ``cluster`` is
the number of blocks per cluster. ``dependent`` is 1 if the kernel may start before the previous kernel has ended, or
else 0. ``bytes`` is the number of bytes that the kernel reads and writes, or 0 if EFFT_EMULATION_COUNT is not set.
emulation.cpp describes this and other environment variables.
"""

import ctypes
import json
import sys

import torch

import efft_kernels.ops  # noqa: F401  # declares the ops
from efft_kernels._packed import Packed, Stack


def main(library: str, tokens: int, rank: int, packed: int, *sizes: int) -> None:
    torch.ops.load_library(library)
    log = ctypes.CDLL(library).efft_emulation_launches
    log.restype = ctypes.c_char_p
    log()

    def launches() -> list[tuple[int, int, int, int]]:
        lines = ([int(word) for word in line.split()] for line in log().decode().splitlines())
        return [(kernel, cluster, dependent, read + written) for kernel, *_, cluster, dependent, read, written in lines]

    for layer, (d_in, d_out) in enumerate(zip(sizes[::2], sizes[1::2], strict=True)):
        x, gy = torch.ones(tokens, d_in, dtype=torch.bfloat16), torch.ones(tokens, d_out, dtype=torch.bfloat16)
        W, b = torch.ones(d_out, d_in, dtype=torch.bfloat16), torch.ones(d_out, dtype=torch.bfloat16)
        D, G = torch.ones(d_in, rank), torch.ones(rank, d_out)
        of = Packed(D, G, G)
        if packed:
            found = Stack(D, G[None]).packed(0, D, torch.bfloat16)
            assert found is not None
            of = found
        _, h = torch.ops.efft.tt_linear_fwd.cuda(x, W, b, of.D, of.G)
        print(json.dumps([layer, "fwd", launches()]))
        torch.ops.efft.tt_linear_bwd.cuda(gy, x, W, h, of.D, of.G_rows, True, True, True, False)
        print(json.dumps([layer, "bwd", launches()]))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
