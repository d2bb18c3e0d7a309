"""This folder contains Triton kernels for NVIDIA GPUs of compute capability 8.0 and newer, and for AMD GPUs.

Each op has one file, which :mod:`efft_kernels.ops` imports when the op first runs, because Triton may not be installed.
The linear ops use the kernels in ``lowrank_gemm`` (products) and ``reduce_tokens`` (sums over tokens). A *producer* is
the operation whose output the layer reads, a GELU or a layer norm; ``producers`` contains the code with which the
kernels apply it. ``launch`` chooses the tile sizes. ``interpreter`` makes Triton's interpreter, which runs
kernels on the CPU for tests, compute bfloat16 correctly.
"""
