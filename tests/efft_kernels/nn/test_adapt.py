"""Test adapting weights by name.

The tests cover the classes of the new layers, refused weights and wrong names, modules that read the weight of a child
layer, layers in two places, and embeddings with a padding row.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efft_kernels import EfftConv1D, EfftConv1d, EfftConv2d, EfftConv3d, EfftEmbedding, EfftLinear, Site, TTFactors
from efft_kernels.nn.adapt import adapt, cannot_adapt, layer_class, mark_readers, named_adapted_weights, restore
from efft_kernels.nn.effective import Effective
from efft_kernels.nn.pooled import PooledDelta


class Conv1D(nn.Module):
    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.weight, self.bias = nf, nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))


class OtherLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class SameConv(nn.Conv2d):
    def _conv_forward(self, *args: Any) -> Tensor:
        return super()._conv_forward(*args) + 1


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        y: Tensor = self.proj(q * k + v @ self.scale)
        return y


def bank(d_in: int, d_out: int) -> tuple[TTFactors, Site]:
    factors = TTFactors(d_in, d_out, 2)
    for factor in factors.parameters():
        nn.init.normal_(factor)
    return factors, Site()


def test_who_stands_in_for_whom() -> None:
    pairs = [
        (nn.Linear(3, 3), EfftLinear),
        (OtherLinear(3, 3), EfftLinear),
        (nn.Conv1d(3, 3, 1), EfftConv1d),
        (nn.Conv2d(3, 3, 1), EfftConv2d),
        (nn.Conv3d(3, 3, 1), EfftConv3d),
        (nn.Embedding(3, 3), EfftEmbedding),
        (Conv1D(3, 4), EfftConv1D),
        (nn.Bilinear(3, 3, 3), None),
        (nn.ConvTranspose2d(3, 3, 1), None),
    ]
    for layer, kind in pairs:
        assert layer_class(layer) is kind


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (OtherLinear(3, 3), "OtherLinear has its own forward method"),
        (SameConv(3, 3, 1), "SameConv has its own forward method"),
        (nn.Embedding(3, 3, max_norm=1.0), "with max_norm changes its weight in each call; expected max_norm=None"),
        (nn.Embedding(3, 3, sparse=True), "expected an embedding with dense gradients"),
        (nn.Embedding(3, 3, scale_grad_by_freq=True), "expected an embedding with dense gradients"),
        (nn.ConvTranspose2d(3, 3, 1), "expected a linear layer, a convolution, .* got ConvTranspose2d; name the param"),
        (EfftLinear.from_linear(nn.Linear(3, 3)), "this layer is adapted already"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_reasons(layer: nn.Module, reason: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), layer)
    with pytest.raises(TypeError, match=f"1: .*{reason}"):
        adapt(model, {"0": bank(3, 3), "1": bank(3, 3)})
    assert type(model[0]) is nn.Linear, "an error must leave the model unchanged"
    assert model[1] is layer


def test_names_that_are_not_there() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    for name in ("1", "0.0", "2.weight", "0.other"):
        assert cannot_adapt(model, name) == "the model has no layer and no parameter with this name"
    assert cannot_adapt(model, "0.in_features") == "there is no such parameter"
    assert cannot_adapt(model, "0") is None
    assert cannot_adapt(model, "0.weight") is None
    assert "2 dimensions" in str(cannot_adapt(model, "0.bias"))


def test_what_a_parent_reads_is_right_at_any_time() -> None:
    model = nn.Sequential(Block(), Block())
    names = [f"{i}.{name}" for i in range(2) for name in ("qkv", "proj", "scale")]
    sizes = {"qkv": (4, 12), "proj": (4, 4), "scale": (4, 4)}
    originals = {name: model.get_submodule(name) for name in names if not name.endswith("scale")}
    x = torch.randn(2, 4)
    before = model(x)
    weights = adapt(model, {n: bank(*sizes[n[2:]]) for n in names}, views={"0.scale": "transposed"})
    assert dict(named_adapted_weights(model)) == weights
    assert [name for name, weight in weights.items() if getattr(weight, "read", False)] == ["0.qkv", "1.qkv"]
    assert mark_readers(model) == {"0.qkv": "Block", "1.qkv": "Block"}
    assert type(model[0].qkv.weight) is Effective
    assert model[0].proj.weight is weights["0.proj"].stored
    y = model(x)
    for weight in weights.values():
        weight.merge()
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    restore(model, {weights[name]: layer for name, layer in originals.items()})
    assert torch.equal(model(x), before)


def test_a_layer_in_two_places_has_one_stand_in() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "c": nn.Sequential()})
    model["c"].append(model["a"])
    weights = adapt(model, {"a": bank(3, 3)})
    assert model["a"] is model["c"][0] is weights["a"]


def test_the_row_of_padding_has_no_update() -> None:
    embedding = nn.Embedding(5, 4, padding_idx=2)
    layer = EfftEmbedding(embedding, *bank(5, 4))
    ids = torch.tensor([0, 2, 4])
    y = layer(ids)
    assert torch.equal(y[1], embedding.weight[2])
    assert not torch.equal(y[0], embedding.weight[0])
    assert not layer.delta_weight()[2].any()
    (gradient,) = torch.autograd.grad(y[1].sum(), layer.factors.U)
    assert not gradient.any()
    layer.merge()
    torch.testing.assert_close(layer(ids), y)
    assert not layer.base_weight[2].any()


def test_a_layer_that_holds_no_sum_refuses_what_its_parent_reads() -> None:
    out = nn.MultiheadAttention(4, 2).out_proj
    with pytest.raises(TypeError, match=r"PooledDelta: this is the out_proj of nn\.MultiheadAttention, which reads"):
        PooledDelta(out, ContextVar("selected"))
