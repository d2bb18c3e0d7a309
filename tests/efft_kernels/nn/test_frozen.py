"""Test adapted layers whose frozen weight is packed, which means that several values share one byte.

The class of such a layer computes the product itself and has its own state dict. One test uses a quantized weight in a
layer with a custom forward method.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efft_kernels import EfftLinear
from efft_kernels.nn.frozen import FrozenLayer, dequantized
from tests.quantized import to_int8


class Nibbles(nn.Parameter):
    """Store two 4-bit values per byte in a flat tensor, like bitsandbytes."""

    def _quantize(self) -> None:
        raise NotImplementedError("the library only checks that this method exists")


class NibbleLinear(nn.Linear):
    """Compute with a packed weight, and save the weight's scale in the state dict."""

    scale: float

    @classmethod
    def of(cls, linear: nn.Linear) -> NibbleLinear:
        layer = cls(linear.in_features, linear.out_features)
        layer.load_state_dict(linear.state_dict())
        layer.scale = layer.weight.abs().max().item() / 7
        values = (layer.weight.detach() / layer.scale).round().to(torch.int8).add(8).to(torch.uint8).flatten()
        layer.weight = Nibbles((values[::2] << 4 | values[1::2])[:, None], requires_grad=False)
        return layer

    def dense(self) -> Tensor:
        bits = self.weight.detach()
        values = torch.stack([bits >> 4, bits & 15], 1).flatten().float() - 8
        return self.scale * values.view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense(), self.bias)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight.scale"] = torch.tensor(self.scale)


@pytest.fixture
def layer() -> EfftLinear:
    layer = EfftLinear.from_linear(NibbleLinear.of(nn.Linear(8, 12)), rank=2)
    for factor in layer.factors.parameters():
        nn.init.normal_(factor)
    return layer


def test_product_and_gradients(layer: Any) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    y = layer(x)
    W = layer.dense() + layer.delta_weight()
    torch.testing.assert_close(y, F.linear(x, W, layer.bias))
    torch.testing.assert_close(*torch.autograd.grad(y.sum(), x), W.sum(0).expand(3, 8))
    layer.enabled = False
    assert torch.equal(layer(x), F.linear(x, layer.dense(), layer.bias))


def test_it_is_of_both_classes(layer: EfftLinear) -> None:
    assert isinstance(layer, NibbleLinear)
    assert isinstance(layer, FrozenLayer)
    assert type(layer) is type(EfftLinear.from_linear(NibbleLinear.of(nn.Linear(4, 4)), rank=2)), (
        "the class is created once"
    )
    assert type(EfftLinear.from_linear(nn.Linear(4, 4), rank=2)) is EfftLinear
    assert "weight.scale" in layer.state_dict()


def test_a_quantised_weight_inside_a_forward_of_its_own() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    frozen = Doubling(8, 12)
    to_int8(frozen)
    layer = EfftLinear.from_linear(frozen, rank=2)
    for factor in layer.factors.parameters():
        nn.init.normal_(factor)
    x = torch.randn(3, 8)
    torch.testing.assert_close(layer(x), frozen(x) + x @ layer.delta_weight().t())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies(layer: EfftLinear, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    x = torch.randn(3, 8)
    twin = duplicate(layer)
    assert type(twin) is type(layer)
    assert torch.equal(twin(x), layer(x))
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in layer.parameters()}


def test_compiles_whole(layer: EfftLinear) -> None:
    x = torch.randn(3, 8)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, layer(x))
    torch._dynamo.reset()


def test_it_cannot_be_made_dense(layer: EfftLinear) -> None:
    with pytest.raises(TypeError, match=r"the weight is a Nibbles, to which no update can be added"):
        layer.merge()
    with pytest.raises(TypeError, match=r"got a Nibbles: load the adapter onto the dense base"):
        layer.merge(dequantize=True)
    with pytest.raises(TypeError, match=r"expected a weight whose class has dequantize\(\)"):
        dequantized(layer.weight)
    assert not layer.merged


def test_a_product_without_a_gradient_is_no_base_to_train_on(
    layer: EfftLinear, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    layer(x)
    monkeypatch.setattr(type(layer), "product", torch.no_grad()(NibbleLinear.forward))
    layer(x.detach())
    with torch.no_grad():
        layer(x)
    with pytest.raises(RuntimeError, match="a Nibbles computed its product without a gradient for its input"):
        layer(x)
