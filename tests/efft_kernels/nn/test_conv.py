"""Compare ``EfftConv2d`` with a convolution by the dense sum of kernel and update in fp64.

Other tests cover merging, low precision, the state dict, compilation and refused arguments.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efft_kernels import EfftConv2d, Site, TTFactors

#: The settings of each convolution, and the shape of its input.
CASES: list[tuple[dict[str, Any], tuple[int, ...]]] = [
    ({"kernel_size": 3, "padding": 1}, (2, 6, 9, 7)),
    ({"kernel_size": (3, 5), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}, (2, 6, 11, 13)),
    ({"kernel_size": 3, "padding": "same", "padding_mode": "circular", "bias": False}, (1, 6, 5, 5)),
    ({"kernel_size": 4, "stride": 4}, (3, 6, 8, 12)),
    ({"kernel_size": 1}, (2, 6, 5, 3)),
    ({"kernel_size": 1, "stride": 2}, (2, 6, 5, 3)),
    ({"kernel_size": 1, "padding": 1}, (2, 6, 5, 3)),
    ({"kernel_size": 3}, (6, 5, 5)),
    ({"kernel_size": 3, "padding": 1}, (0, 6, 4, 4)),
]


def adapted(dtype: torch.dtype = torch.float64, **settings: Any) -> EfftConv2d:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, dtype=dtype, **settings)
    factors = TTFactors(conv.weight[0].numel(), 10, (3, 4), scale=0.7, dtype=torch.promote_types(dtype, torch.float32))
    with torch.no_grad():
        for factor in factors.parameters():
            factor.normal_(std=0.5)
    return EfftConv2d(conv, factors, Site(), own_factors=True)


def reference(layer: EfftConv2d, x: Tensor) -> Tensor:
    """Return the convolution with a dense update, computed by the formula of the tensor train."""
    f = layer.factors
    delta = (f.scale * f.U @ f.C[0, 0] @ f.V).T.reshape(layer.weight.shape)  # type: ignore[operator, index, union-attr]
    plain = nn.Conv2d(
        6, 10, layer.kernel_size, layer.stride, layer.padding, layer.dilation, padding_mode=layer.padding_mode
    )
    return plain.double()._conv_forward(x, layer.weight + delta, layer.bias)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("settings", "shape"), CASES, ids=str)
def test_output_and_gradients(settings: dict[str, Any], shape: tuple[int, ...], last: bool) -> None:
    layer = adapted(**settings)
    x = torch.randn(shape, dtype=torch.float64)
    if last and x.dim() == 4:
        x, layer = x.contiguous(memory_format=torch.channels_last), layer.to(memory_format=torch.channels_last)
    x.requires_grad_()
    wanted = [x, *layer.factors.parameters()]
    y, expected = layer(x), reference(layer, x)
    torch.testing.assert_close(y, expected)
    gy = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, wanted, gy), torch.autograd.grad(expected, wanted, gy), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert layer.weight.grad is None
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_merge_and_back(last: bool) -> None:
    layer = adapted(kernel_size=3, padding=1)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    if last:
        layer = layer.to(memory_format=torch.channels_last)
    before, expected = layer.weight.clone(), layer(x)
    loss = layer.merge()
    assert loss is not None
    assert loss.relative_error < 1e-10
    torch.testing.assert_close(layer.weight - before, layer.delta_weight())
    torch.testing.assert_close(F.conv2d(x, layer.weight, layer.bias, padding=1), expected)
    torch.testing.assert_close(layer(x), expected)
    layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_low_precision_and_autocast() -> None:
    layer = adapted(torch.float32, kernel_size=3, padding=1)
    x = torch.randn(2, 6, 8, 8)
    exact = reference(copy.deepcopy(layer).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x)
    assert mixed.dtype == torch.bfloat16
    half = layer.to(torch.bfloat16)(x.bfloat16())
    for y in (mixed, half):
        assert (y.double() - exact).norm() / exact.norm() < 2e-2


def test_replaces_the_layer_for_everything_that_looks_at_it() -> None:
    layer = adapted(kernel_size=3, padding=1)
    assert isinstance(layer, nn.Conv2d)
    assert list(layer.state_dict()) == ["weight", "bias", "factors.U", "factors.C", "factors.V"]
    assert "3, padding=(1, 1)" in repr(layer) or "kernel_size=(3, 3)" in repr(layer)


def test_one_graph_under_compile() -> None:
    layer = adapted(torch.float32, kernel_size=1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for x in (torch.randn(2, 6, 5, 3), torch.randn(2, 6, 5, 3).contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(compiled(x), layer(x))


def test_what_is_no_such_convolution_is_refused() -> None:
    factors = TTFactors(9, 6, 2)
    with pytest.raises(ValueError, match=r"\(in_features, out_features\) = \(9, 6\), got \(54, 6\)"):
        EfftConv2d(nn.Conv2d(6, 6, 3), factors, Site())
    with pytest.raises(TypeError, match=r"expected an nn\.Conv2d, got Conv1d"):
        EfftConv2d(nn.Conv1d(6, 6, 3), factors, None)  # type: ignore[arg-type]
