"""Run forward and backward calls of several layers or MLPs in the CUDA emulator, and print the launches.

Usage: ``python block.py LIBRARY FORM TOKENS RANK PACKED D_IN D_OUT [D_IN D_OUT ...]``. LIBRARY is a library that
build.py in this folder has built. FORM is one of the following:

- ``linear``: every pair of D_IN and D_OUT is one layer, which is one call of ``tt_linear``.
- ``mlp``: every pair is the width and the hidden width of an MLP with a norm, which is one call of ``tt_mlp``.
- ``fused``: the same MLP, as a call of ``tt_norm_linear`` and one of ``tt_gelu_linear``.

PACKED is 1 if the factors D and G are packed before the calls (copied to the type and layout that the kernels read, see
efft_kernels/_packed.py), or else 0.

Each printed line is JSON: the number of the layer or MLP, "fwd" or "bwd", and a list with [kernel, cluster, dependent,
bytes] for each launch. ``kernel`` is the distance in bytes from the start of the library to the kernel's code.
``cluster`` is the number of blocks per cluster. ``dependent`` is 1 if the kernel may start before the previous kernel
has ended, or else 0. ``bytes`` is the number of bytes that the kernel reads and writes, or 0 if EFFT_EMULATION_COUNT is
not set. emulation.cpp describes this and other environment variables.
"""

import ctypes
import json
import sys

import torch
from torch import Tensor

import efft_kernels.ops  # noqa: F401  # declares the ops
from efft_kernels._packed import Packed, Stack

EPS = 1e-5


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


def factors(d_in: int, d_out: int, rank: int, packed: int) -> Packed:
    D, G = torch.ones(d_in, rank), torch.ones(rank, d_out)
    if not packed:
        return Packed(D, G, G)
    found = Stack(D, G[None]).packed(0, D, torch.bfloat16)
    assert found is not None
    return found


def main(library: str, form: str, tokens: int, rank: int, packed: int, *sizes: int) -> None:
    torch.ops.load_library(library)
    ops = torch.ops.efft
    log = ctypes.CDLL(library).efft_emulation_launches
    log.restype = ctypes.c_char_p
    log()

    def report(number: int, direction: str) -> None:
        lines = ([int(word) for word in line.split()] for line in log().decode().splitlines())
        found = [
            (kernel, cluster, dependent, read + written) for kernel, *_, cluster, dependent, read, written in lines
        ]
        print(json.dumps([number, direction, found]))

    for number, (d_in, d_out) in enumerate(zip(sizes[::2], sizes[1::2], strict=True)):
        x, of = ones(tokens, d_in), factors(d_in, d_out, rank, packed)
        W, b = ones(d_out, d_in), ones(d_out)
        if form == "linear":
            _, h = ops.tt_linear_fwd.cuda(x, W, b, of.D, of.G)
            report(number, "fwd")
            ops.tt_linear_bwd.cuda(ones(tokens, d_out), x, W, h, of.D, of.G_rows, True, True, True, False)
            report(number, "bwd")
            continue
        second, gy = factors(d_out, d_in, rank, packed), ones(tokens, d_in)
        W2, b2, norm = ones(d_in, d_out), ones(d_in), (ones(d_in), ones(d_in), EPS)
        if form == "mlp":
            layers = W, b, of.D, of.G, W2, b2, second.D, second.G
            _, z, *products, mean, rstd = ops.tt_mlp_fwd.cuda(x, *norm, *layers, "none")
            report(number, "fwd")
            both = W, W2, *products, of.D, of.G_rows, second.D, second.G_rows
            need = (True, True, True, False, True, True, False, False, False)
            ops.tt_mlp_bwd.cuda(gy, x, z, *norm, mean, rstd, *both, "none", *need)
        else:
            z, h, mean, rstd = ops.tt_norm_linear_fwd.cuda(x, *norm, W, b, of.D, of.G)
            _, h2 = ops.tt_gelu_linear_fwd.cuda(z, W2, b2, second.D, second.G, "none")
            report(number, "fwd")
            need = (True, True, True, False)
            dz, *_ = ops.tt_gelu_linear_bwd.cuda(gy, z, W2, h2, second.D, second.G_rows, "none", *need)
            ops.tt_norm_linear_bwd.cuda(dz, x, *norm, mean, rstd, W, h, of.D, of.G_rows, *need, False, False)
        report(number, "bwd")


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
