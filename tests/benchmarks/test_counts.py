"""Compare the formulas for FLOPs and bytes with torch's operation counter and with the sizes of the tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.counts import Sizes, measure_peaks
from benchmarks.ops.cases import Inputs, make_inputs
from benchmarks.ops.rows import ROWS

SIZES = Sizes(tokens=31, d_in=24, d_out=40, rank=5, width=4)


def counted(row: str, phase: str) -> int:
    layer = ROWS[row].build(make_inputs(SIZES, torch.float32))
    if phase == "bwd":
        layer.backward()
    with FlopCounterMode(display=False) as counter:
        {"fwd": layer.forward, "bwd": layer.backward, "fwd_bwd": layer.forward_backward}[phase]()
    return counter.get_total_flops()


@pytest.mark.parametrize("phase", ["fwd", "bwd", "fwd_bwd"])
def test_flops_are_those_of_the_products(phase: str) -> None:
    floor, chain = counted("floor", phase), counted("chain", phase)
    assert SIZES.floor(phase).flops == floor
    assert (SIZES.floor(phase) + SIZES.delta(phase)).flops == chain
    assert SIZES.limit(phase) == chain / floor


def nbytes(*tensors: Tensor | None) -> int:
    return sum(t.nbytes for t in tensors if t is not None)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def inputs(request: pytest.FixtureRequest) -> Inputs:
    return make_inputs(SIZES, request.param)


def test_bytes_are_those_of_the_tensors(inputs: Inputs) -> None:
    i, sizes = inputs, Sizes(31, 24, 40, 5, inputs.x.itemsize)
    y, h = F.linear(i.x, i.W, i.b), i.x @ i.D.to(i.x.dtype)
    assert sizes.floor("fwd").bytes == nbytes(i.x, i.W, i.b, y)
    assert sizes.floor("bwd").bytes == nbytes(i.gy, i.W, i.x)  # dx is as large as x
    assert sizes.delta("fwd").bytes == nbytes(i.D, i.G, h)
    assert sizes.delta("bwd").bytes == nbytes(i.x, h, i.D, i.G, i.D, i.G)  # dD and dG are as large as D and G
    assert sizes.delta("fwd_bwd").bytes == sizes.delta("fwd").bytes + sizes.delta("bwd").bytes


def test_the_limit_of_a_layer_known_by_hand() -> None:
    """The limit is the ratio of the FLOPs with the update and without it.

    For ViT-B's qkv at rank 32, the limit is 1 + 3 · 32 · (768 + 2304) / (2 · 768 · 2304) = 1 + 1/12.
    """
    assert Sizes(1576, 768, 2304, 32, 4).limit("fwd_bwd") == pytest.approx(1 + 1 / 12)


def test_peaks_are_those_of_some_computer() -> None:
    peaks = measure_peaks("cpu", torch.float32, seconds=0.05)
    assert 1e8 < peaks.flops_per_s < 1e14
    assert 1e7 < peaks.bytes_per_s < 1e13
