"""Test which parameters the methods of a class read, in classes defined here and in those of common libraries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efft_kernels.nn.reads import reads_weight_of_children


def reads(module: nn.Module) -> set[str]:
    """Return the weights of ``module`` that its own methods read."""
    parameters = dict(module.named_parameters())
    return {
        name for name in reads_weight_of_children(type(module)) if name in parameters and parameters[name].dim() > 1
    }


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(3, 3) for _ in range(5))
        self.f = nn.Sequential(nn.Linear(3, 3))
        self.w = nn.Parameter(torch.zeros(3, 3))
        self.reset()

    def reset(self) -> None:
        nn.init.zeros_(self.e.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.b.weight.dtype), self.a.weight.t()) * self.b.weight.shape[0]

    @property
    def summed(self) -> Tensor:
        return self.c.weight.sum()


class Asks(Base):
    def forward(self, x: Tensor) -> Tensor:
        known = isinstance(self.b.weight, Tensor) and len(self.a.weight) + id(self.w) != hash(type(self.d.weight))
        return self.a(x) if known else x @ self.e.weight


class Overrides(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(x) + sum(x @ self.d.weight for _ in range(2))


class Extends(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return (lambda z: z + self.w)(y)


def test_chains_of_attributes() -> None:
    assert reads(Base()) == {"a.weight", "c.weight"}
    assert reads(Overrides()) == {"d.weight", "c.weight"}
    assert reads(Extends()) == {"a.weight", "c.weight", "w"}
    assert reads(Asks()) == {"e.weight", "c.weight"}
    assert reads(nn.Linear(3, 3)) == {"weight"}
    assert reads(nn.Sequential(nn.Linear(3, 3))) == set()


def test_blocks_of_torch() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16)
    attention = {"self_attn.in_proj_weight", "self_attn.out_proj.weight"}
    assert reads(block) == {"linear1.weight", "linear2.weight", *attention}
    assert reads(nn.MultiheadAttention(8, 2)) == {"in_proj_weight", "out_proj.weight"}
    assert reads(nn.TransformerDecoderLayer(8, 2, 16)) == set()


@pytest.mark.parametrize("name", ["ShiftedWindowAttention", "ShiftedWindowAttentionV2"])
def test_swin_of_torchvision(name: str) -> None:
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    module = getattr(swin, name)(8, [2, 2], [0, 0], 2)
    assert {"qkv.weight", "proj.weight"} <= reads(module)


@pytest.mark.parametrize(
    ("path", "name", "settings"),
    [
        ("beit", "Attention", {"qkv_bias": True}),
        ("eva", "EvaAttention", {"qkv_fused": True, "norm_layer": nn.LayerNorm}),
        ("swin_transformer_v2", "WindowAttention", {"window_size": (2, 2)}),
    ],
)
def test_attention_of_timm(path: str, name: str, settings: dict[str, Any]) -> None:
    timm = pytest.importorskip(f"timm.models.{path}")
    assert "qkv.weight" in reads(getattr(timm, name)(dim=8, num_heads=2, **settings))
    assert "proj.weight" not in reads(getattr(timm, name)(dim=8, num_heads=2, **settings))


def test_t5_of_transformers() -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    # T5DenseActDense inspects only the type and the dtype of ``wo.weight``, and then calls the layer ``wo``.
    assert reads(t5.T5DenseActDense(t5.T5Config(d_model=8, d_ff=16))) == set()
    assert reads(t5.T5Attention(t5.T5Config(d_model=8, num_heads=2, d_kv=4))) == set()
