"""Compare the public layer and a complete model on the triton backend with the reference backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import efft
from efft_kernels import EfftLinear, tt_mlp, use_backend
from efft_kernels.testing import make_inputs
from efft_kernels.triton import tt_mlp as triton_mlp
from efft_kernels.triton.launch import Device
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


@pytest.mark.parametrize("norm", ["norm", "no norm"])
@pytest.mark.parametrize(
    "frozen", [(), ("x",), ("D1", "G1"), ("D2", "G2"), ("x", "gamma", "beta", "b1", "D1", "G1")], ids=str
)
def test_an_mlp_of_the_second_generation(monkeypatch: pytest.MonkeyPatch, norm: str, frozen: tuple[str, ...]) -> None:
    """Two launches compute the sums over tokens of both layers, whichever gradients are needed."""
    monkeypatch.setattr(triton_mlp, "KERNELS", 2)
    inputs = make_inputs("tt_mlp", tokens=70, d_in=24, d_hidden=40, d_out=20, r1=5)
    if norm == "no norm":
        inputs |= {"gamma": None, "beta": None, "eps": None}
    leaves = {name: t for name, t in inputs.items() if isinstance(t, Tensor) and name not in ("W1", "W2", *frozen)}
    for leaf in leaves.values():
        leaf.requires_grad_()

    def gradients(backend: str) -> dict[str, Tensor]:
        y = tt_mlp(**inputs, backend=backend)
        found = torch.autograd.grad(y.square().sum(), list(leaves.values()))
        return dict(zip(leaves, found, strict=True))

    with checked() as names:
        got = gradients("triton")
    assert_same(got, gradients("reference"), 1e-4)
    sums = [name for name in names if name.startswith(("reduce", "finish"))]
    together = not {"D1", "D2"} & set(frozen)
    assert sums == (
        ["reduce_two_kernel", "finish_two_kernel"] if together else ["reduce_tokens_kernel", "finish_kernel"]
    )


def test_an_mlp_of_the_second_generation_on_older_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below compute capability 9.0, each layer has its own launches."""
    monkeypatch.setattr(triton_mlp, "KERNELS", 2)
    monkeypatch.setattr(triton_mlp, "device", lambda of: Device(108, 166912, 8))
    inputs = make_inputs("tt_mlp", tokens=70, d_in=24, d_hidden=40, d_out=20, r1=5)
    factors = [inputs[name].requires_grad_() for name in ("D1", "G1", "D2", "G2")]
    with checked() as names:
        torch.autograd.grad(tt_mlp(**inputs, backend="triton").sum(), factors)
    sums = [name for name in names if name.startswith(("reduce", "finish"))]
    assert sums == ["reduce_tokens_kernel", "finish_kernel"] * 2


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
