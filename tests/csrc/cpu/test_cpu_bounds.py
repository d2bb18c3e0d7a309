"""Test that ops of the backend cpu do not read memory beyond the end of an operand.

The ops are ``tt_linear``, ``tt_mlp``, and the ops with a producer, a GELU or layer norm before the layer. Each operand
ends directly before an unreadable page of memory, so an access beyond the end stops the process. This also finds wrong
loads of matrix registers (AMX), which the sanitizers do not check. The results must agree with those of operands in
ordinary memory.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from efft_kernels import native

pytestmark = pytest.mark.skipif(native.MISSING["cpu"] is not None, reason=native.MISSING["cpu"] or "")

PROGRAM = """
import ctypes, mmap, random
import torch
from efft_kernels import tt_gelu_linear, tt_linear, tt_mlp, tt_norm_linear

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

def at_the_end(tensor):
    # The last element lies in the last bytes before an unreadable page.
    size = tensor.numel() * tensor.element_size()
    pages = -(-max(size, 1) // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(start + pages * mmap.PAGESIZE, mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, offset=pages * mmap.PAGESIZE - size, count=tensor.numel())
    return copy.view(tensor.shape).copy_(tensor)

draw = random.Random(0)
torch.manual_seed(0)
for _ in range(150):
    tokens, d_in, d_out, r = draw.randint(1, 70), draw.randint(1, 90), draw.randint(1, 90), draw.randint(1, 40)
    dtype = draw.choice([torch.bfloat16, torch.float32])
    x, W, b, gy = (torch.randn(size).to(dtype) for size in ((tokens, d_in), (d_out, d_in), (d_out,), (tokens, d_out)))
    D, G, W2 = torch.randn(d_in, r), torch.randn(r, d_out), torch.randn(d_out, d_out).to(dtype)
    for op in (
        lambda x, W, b, D, G: tt_linear(x, W, b, D, G, backend="cpu"),
        lambda x, W, b, D, G: tt_gelu_linear(x, W, b, D, G, backend="cpu"),
        lambda x, W, b, D, G: tt_norm_linear(x, None, None, W, b, D, G, backend="cpu"),
        lambda x, W, b, D, G: tt_norm_linear(x, D[:, 0].contiguous(), D[:, -1].contiguous(), W, b, D, G, backend="cpu"),
        lambda x, W, b, D, G: tt_mlp(x, W, b, D, G, at_the_end(W2), b, G.t(), G, eps=1e-5, backend="cpu"),
    ):
        results = []
        for place in (torch.clone, at_the_end):
            x_, b_, D_, G_ = (place(t).requires_grad_() for t in (x, b, D, G))
            y = op(x_, place(W), b_, D_, G_)
            results.append([y, *torch.autograd.grad(y, (x_, b_, D_, G_), place(gy))])
        for ours, other in zip(*results):
            torch.testing.assert_close(ours, other, rtol=2e-2, atol=2e-2 * float(other.abs().max()), equal_nan=True)
print("whole")
"""


def test_operands_that_end_at_an_unreadable_page() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr[-2000:]
