"""Compare the public layer and a complete model on the triton backend with the reference backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import efft
from efft_kernels import EfftLinear, use_backend
from tests.efft_kernels.triton.address_checker import checked


def step(model: nn.Module, x: Tensor, backend: str) -> dict[str, Tensor]:
    """Return the output and every gradient; all calls use the same dropout masks."""
    model.zero_grad()
    torch.manual_seed(1)
    with use_backend(backend):
        y = model(x)
        y.float().square().sum().backward()
    return {"y": y.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in got.items():
        error = (value - expected[name]).norm() / expected[name].norm()
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_layer(dtype: torch.dtype) -> None:
    layer = EfftLinear.from_linear(nn.Linear(24, 36, dtype=dtype), rank=5, n_cores=3, dropout=0.2, init="u")
    nn.init.normal_(layer.factors.U, std=0.3)
    x = torch.randn(2, 7, 24, dtype=dtype)
    with checked() as names:
        got = step(layer, x, "triton")
    # x does not need a gradient here, so only the projection computes dh.
    backward = ["project_kernel", "reduce_tokens_kernel", "finish_kernel", "contract_backward_kernel"]
    assert names == ["contract_kernel", "project_kernel", "lowrank_gemm_kernel", *backward]
    assert_same(got, step(layer, x, "reference"), 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("config", [{"variant": "efft1"}, {"dropout": 0.2}, {"core_sharing": "shared"}], ids=str)
def test_a_vision_transformer(config: dict[str, object]) -> None:
    timm = pytest.importorskip("timm", reason="needs the vision extra")
    model = timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5, drop_path_rate=0.0
    )
    efft.apply(model, efft.EfftConfig(rank=4, **{"dropout": 0.0, **config})).train()
    for _, factor in efft.named_factors(model):
        nn.init.normal_(factor, std=0.3)
    x = torch.randn(2, 3, 16, 16)
    with checked() as names:
        got = step(model, x, "triton")
    assert names.count("contract_kernel") == names.count("contract_backward_kernel") == 4, (
        "the kernel is launched once for each kind of site (qkv, proj, fc1, fc2), not for each layer"
    )
    assert names.count("reduce_tokens_kernel") == 8
    assert_same(got, step(model, x, "reference"), 1e-4)
