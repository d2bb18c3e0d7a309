"""Test the cpu backend with several threads: torch's threads inside a call, and Python threads that call it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import efft_kernels
from efft_kernels import native
from efft_kernels.testing import assert_close_budget, make_inputs

pytestmark = pytest.mark.skipif(native.MISSING["cpu"] is not None, reason=native.MISSING["cpu"] or "")

#: The kernels process a few tokens at a time (a block). There are enough tokens for several blocks in each of four
#: threads. tt_contract divides layers among the threads, and there are more layers than threads.
SIZES = {"tokens": 1100, "d_in": 200, "d_out": 130, "d_hidden": 170, "r1": 19, "n_layers": 7}
#: The inputs of each op for which the tests compute gradients.
TRAINED = {
    "tt_linear": ("x", "D", "G", "b"),
    "tt_gelu_linear": ("z", "D", "G", "b"),
    "tt_norm_linear": ("x", "D", "G", "b", "gamma", "beta"),
    "tt_mlp": ("x", "gamma", "beta", "b1", "D1", "G1", "b2", "D2", "G2"),
    "tt_contract": ("C", "V"),
    "tt_linear_grouped": ("x", "D", "G"),
    "tt_merge_": (),
}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def results(op: str, backend: str = "cpu", wide: bool = False, **options: Any) -> dict[str, Tensor]:
    """Return the output and the gradients of ``op``, computed in fp64 if ``wide``."""
    inputs = make_inputs(op, **{**SIZES, **options})
    if wide:
        inputs = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    leaves = [inputs[name].requires_grad_() for name in TRAINED[op]]
    y = getattr(efft_kernels, op)(**inputs, backend=backend)
    grads = torch.autograd.grad(y, leaves, torch.ones_like(y)) if leaves else ()
    return {"y": y.detach(), **dict(zip(TRAINED[op], grads, strict=True))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", TRAINED)
def test_the_number_of_threads_changes_rounding_alone(op: str, dtype: torch.dtype) -> None:
    options = {"dtype": dtype, "masks": op == "tt_contract"}
    exact = results(op, "reference", wide=True, **options)
    torch.set_num_threads(1)
    alone = results(op, **options)
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        got, again = results(op, **options), results(op, **options)
        for name, value in got.items():
            assert torch.equal(value, again[name]), f"{name} differs from run to run with {threads} threads"
            assert_close_budget(value, exact[name], alone[name], name=name)


def test_many_threads_at_once() -> None:
    """Python threads call ops of different sizes at the same time. No thread may read values of another thread."""
    torch.set_num_threads(2)
    cases = [(op, {"d_in": 64 + 8 * i, "seed": i}) for i, op in enumerate([*TRAINED, "tt_linear", "tt_norm_linear"])]
    expected = [results(op, **options) for op, options in cases]
    start = threading.Barrier(len(cases))

    def work(case: tuple[str, dict[str, int]]) -> list[dict[str, Tensor]]:
        start.wait(60)
        return [results(case[0], **case[1]) for _ in range(5)]

    with ThreadPoolExecutor(len(cases)) as pool:
        for runs, wanted in zip(pool.map(work, cases), expected, strict=True):
            for got in runs:
                for name, value in got.items():
                    torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-4)


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc/self/statm")
@pytest.mark.parametrize("how", ["one thread", "a thread a call"])
def test_memory_that_is_kept_does_not_grow(how: str) -> None:
    """A thread keeps memory for later calls. Equal calls do not need more of it, and a thread that ends frees it."""

    def call() -> None:
        results("tt_gelu_linear", tokens=96, d_in=1024, d_out=1024, r1=64)

    def in_a_thread() -> None:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    once: Callable[[], None] = call if how == "one thread" else in_a_thread
    for _ in range(10):
        once()
    grown = []
    for _ in range(4):  # with a leak, memory grows in every round; the allocator alone grows only in some rounds
        before = resident()
        for _ in range(20):
            once()
        grown.append(resident() - before)
    assert min(grown) < 10e6, f"memory grows in every round of 20 calls, by these numbers of bytes: {grown}"
