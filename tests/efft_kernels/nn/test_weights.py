"""Compare adapted layers on quantized weights with the dequantized weight in fp64.

Other tests cover the tensors saved for the backward pass, products in fp8, merging and compilation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efft_kernels import EfftLinear
from efft_kernels.nn.frozen import dequantized
from efft_kernels.nn.producers import ProducerOutput
from tests.quantized import ROUNDING_WAYS, WAYS, to_int8, to_nf4

Quantize = Callable[[nn.Linear], None]
D_IN, D_OUT = 64, 96


@pytest.fixture(params=WAYS)
def quantize(request: pytest.FixtureRequest) -> Quantize:
    return WAYS[request.param]


def make(quantize: Quantize, dtype: torch.dtype = torch.float32) -> EfftLinear:
    """Return a quantized layer with a large update."""
    linear = nn.Linear(D_IN, D_OUT, dtype=dtype)
    quantize(linear)
    layer = EfftLinear.from_linear(linear, rank=4, n_cores=3)
    for factor in layer.factors.parameters():
        nn.init.normal_(factor, std=0.25)
    return layer


def dense(layer: EfftLinear, x: Tensor, gy: Tensor) -> tuple[Tensor, ...]:
    """Return y and the gradients of x, U, C, V in fp64, computed with the dense update."""
    x = x.detach().double().requires_grad_()
    U, C, V = (p.detach().double().requires_grad_() for p in layer.factors.parameters())
    update = torch.cat([U @ core @ V for core in C[0]], 1)
    y = x @ (dequantized(layer.weight).double().t() + update) + layer.bias.double()
    return y, *torch.autograd.grad(y, (x, U, C, V), gy.double())


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    error = ((got - expected).norm() / expected.norm()).item()
    assert error < tolerance, error


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_output_and_every_gradient(quantize: Quantize, dtype: torch.dtype, tolerance: float) -> None:
    layer = make(quantize, dtype)
    x, gy = torch.randn(2, 5, D_IN, dtype=dtype, requires_grad=True), torch.randn(2, 5, D_OUT, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    y.backward(gy)
    got = (y, x.grad, *(p.grad for p in layer.factors.parameters()))
    assert {p.grad.dtype for p in layer.factors.parameters() if p.grad is not None} == {torch.float32}
    for ours, expected in zip(got, dense(layer, x, gy), strict=True):
        close(ours, expected, tolerance)
    base = nn.Linear(D_IN, D_OUT, dtype=dtype)
    base.weight, base.bias = layer.weight, layer.bias
    layer.enabled = False
    assert torch.equal(layer(x), base(x))


def test_autocast(quantize: Quantize) -> None:
    layer = make(quantize)
    x = torch.randn(5, D_IN, requires_grad=True)
    gy = torch.randn(5, D_OUT)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.backward(gy.to(y.dtype))
    for ours, expected in zip(
        (y, x.grad, *(p.grad for p in layer.factors.parameters())), dense(layer, x, gy), strict=True
    ):
        close(ours, expected, 2e-2)


@pytest.mark.parametrize("way", [*WAYS, *ROUNDING_WAYS])
def test_nothing_dense_is_kept_for_backward(way: str) -> None:
    """Only the quantized weight is saved. The backward pass dequantizes it again and does not need a dense update."""
    layer = make((WAYS | ROUNDING_WAYS)[way])
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(5, D_IN, requires_grad=True))
    large = [t for t in kept if t.numel() == D_IN * D_OUT]
    assert [type(t) for t in large] == [type(layer.weight)]


@pytest.mark.parametrize("way", ROUNDING_WAYS)
def test_products_that_round_their_input(way: str) -> None:
    """The product rounds its input to int8 or fp8. The gradients treat this rounding as the identity."""
    layer = make(ROUNDING_WAYS[way], torch.bfloat16)
    x = torch.randn(2, 5, D_IN, dtype=torch.bfloat16, requires_grad=True)
    gy = torch.randn(2, 5, D_OUT, dtype=torch.bfloat16)
    y, *gradients = dense(layer, x, gy)
    got = layer(x)
    got.backward(gy)
    error = ((got - y).norm() / y.norm()).item()
    assert 3e-3 < error < 5e-2, "the error is about 1 % with int8 and 3 % with e4m3; bf16 alone would cause less"
    for ours, expected in zip((x.grad, *(p.grad for p in layer.factors.parameters())), gradients, strict=True):
        close(ours, expected, 1e-2)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_float8_product_is_that_of_the_hardware(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch._scaled_mm`` multiplies the input and the frozen weight in fp8, and returns bf16."""
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 products need a GPU of compute capability 8.9 or newer")
    products: list[list[torch.dtype]] = []
    scaled_mm = torch._scaled_mm

    def spy(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        products.append([a.dtype, b.dtype, options["out_dtype"]])
        return scaled_mm(a, b, **options)

    monkeypatch.setattr(torch, "_scaled_mm", spy)
    linear = nn.Linear(D_IN, D_OUT, dtype=torch.bfloat16, device=device)
    if device == "cuda":
        library = pytest.importorskip("torchao.quantization", reason="needs torchao")
        config = library.Float8DynamicActivationFloat8WeightConfig(
            granularity=library.PerRow(), kernel_preference=library.KernelPreference.TORCH
        )
        library.quantize_(linear, config)
    else:
        ROUNDING_WAYS["torchao-float8-float8"](linear)
    layer = EfftLinear.from_linear(linear, rank=4)
    x = torch.randn(16, D_IN, dtype=torch.bfloat16, device=device, requires_grad=True)
    layer(x).sum().backward()
    assert products == [[torch.float8_e4m3fn, torch.float8_e4m3fn, torch.bfloat16]]
    assert x.grad is not None


@pytest.mark.parametrize("module", [nn.LayerNorm(D_IN), nn.GELU()], ids=["norm", "gelu"])
def test_behind_a_deferred_producer(quantize: Quantize, module: nn.Module) -> None:
    layer, x = make(quantize), torch.randn(5, D_IN, requires_grad=True)
    module.requires_grad_(False)
    y = layer(ProducerOutput.of(module, x, getattr(module, "approximate", None)))
    torch.testing.assert_close(y, layer(module(x)), rtol=0, atol=0)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, torch.autograd.grad(layer(module(x)).sum(), x)[0])


def test_merging_is_refused_or_dequantises(quantize: Quantize) -> None:
    layer, x = make(quantize), torch.randn(5, D_IN)
    weight, base, y = layer.weight, dequantized(layer.weight), layer(x)
    with pytest.raises(TypeError, match=f"the weight is a {type(weight).__name__}.*dequantize=True"):
        layer.merge()
    assert layer.weight is weight
    loss = layer.merge(dequantize=True)
    assert loss is not None
    assert loss.relative_error < 1e-6
    assert type(layer.weight) is nn.Parameter
    close(layer.weight, base.double() + layer.delta_weight().double(), 1e-6)
    close(layer(x), y, 1e-6)
    copies = [] if quantize is to_nf4 else [copy.deepcopy(layer)]  # torchao would quantize a copy again
    for each in (*copies, layer):
        each.unmerge()
        assert type(each.weight) is type(weight)
        assert not each.weight.requires_grad
        assert torch.equal(each(x), y)


def test_a_subclass_that_cannot_be_dequantised(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make(to_int8)
    weight = layer.weight
    monkeypatch.delattr(type(weight), "dequantize")
    with pytest.raises(TypeError, match=r"expected a weight whose class has dequantize\(\), .* got a Int8"):
        layer.merge(dequantize=True)
    assert layer.weight is weight
    assert not layer.merged


def test_a_plain_weight_is_its_own_dense_form() -> None:
    weight = nn.Linear(3, 4).weight
    assert dequantized(weight) is weight


def test_compiles_whole(quantize: Quantize) -> None:
    layer, x = make(quantize), torch.randn(5, D_IN)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, layer(x))
    torch._dynamo.reset()
