"""Triton kernels for GPUs of compute capability 8.0 and newer.

Each op has one file, which :mod:`efft_kernels.ops` imports when the op first runs, because Triton need not be
installed. The linear ops are made of two kernels, in ``lowrank_gemm`` and ``reduce_tokens``, which apply the producers
in ``producers``; ``launch`` holds the tile sizes and where they come from; ``interpreter`` makes Triton's interpreter
compute bfloat16 correctly.
"""
