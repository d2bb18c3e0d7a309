"""Test adapters on quantized layers of bitsandbytes, whose classes have their own matrix products and state dicts."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import efft
from efft_kernels import EfftLinear

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'efft-kernels[dev]'")

Make = Callable[..., nn.Module]
CONFIG = {"rank": 4, "dropout": 0.0}


def to_4bit(linear: nn.Linear) -> nn.Linear:
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, quant_type="nf4")
    layer.support_avx512bf16_for_cpu = False  # this option packs weights after inference, which removes the gradients
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def to_8bit(linear: nn.Linear) -> nn.Linear:
    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def dense(layer: nn.Linear) -> Tensor:
    """Return the dequantized weight of a layer in fp64."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    scale = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    return layer.weight.data.double() * scale.double()[:, None] / 127


@pytest.fixture(params=[to_4bit, to_8bit], ids=lambda f: f.__name__)
def quantize(request: pytest.FixtureRequest) -> Callable[[nn.Linear], nn.Linear]:
    return request.param


@pytest.fixture
def backbone(quantize: Callable[[nn.Linear], nn.Linear], tiny_vit: Make) -> Make:
    """Return a tiny ViT whose blocks are quantized."""

    def make() -> nn.Module:
        model = tiny_vit()
        for name, module in list(model.named_modules()):
            if name.startswith("blocks.") and isinstance(module, nn.Linear):
                model.set_submodule(name, quantize(module))
        return model

    return make


@pytest.fixture
def adapted(backbone: Make, randomize: Make) -> nn.Module:
    return randomize(efft.apply(backbone(), efft.EfftConfig(**CONFIG)), std=0.2)


def test_output_and_every_gradient_of_a_layer(quantize: Callable[[nn.Linear], nn.Linear]) -> None:
    """The oracle uses the dequantized weight and the dense update in fp64."""
    frozen = quantize(nn.Linear(64, 96))
    layer = EfftLinear.from_linear(frozen, rank=4, n_cores=3)
    assert isinstance(layer, type(frozen)), "the adapted layer must have the product and the state dict of its class"
    for factor in layer.factors.parameters():
        nn.init.normal_(factor, std=0.5)
    x, gy = torch.randn(2, 5, 64, requires_grad=True), torch.randn(2, 5, 96)
    y = layer(x)
    y.backward(gy)
    wide = x.detach().double().requires_grad_()
    U, C, V = (p.detach().double().requires_grad_() for p in layer.factors.parameters())
    update = torch.cat([U @ core @ V for core in C[0]], 1)
    expected = wide @ (dense(layer).t() + update) + layer.bias.double()
    gradients = torch.autograd.grad(expected, (wide, U, C, V), gy.double())
    got = (y, x.grad, *(p.grad for p in layer.factors.parameters()))
    for ours, want in zip(got, (expected, *gradients), strict=True):
        error = ((ours - want).norm() / want.norm()).item()
        # bitsandbytes rounds the activations of 8-bit layers and applies their scales in fp16.
        assert error < (1e-6 if quantize is to_4bit else 2e-2), error


def test_trains_as_with_the_dequantised_weights(adapted: nn.Module, tiny_vit: Make, images: Tensor) -> None:
    plain = efft.apply(tiny_vit(), efft.EfftConfig(**CONFIG))
    plain.load_state_dict(
        {n: t for n, t in adapted.state_dict().items() if n in plain.state_dict()}
        | {
            f"{n}.weight": dense(m)
            for n, m in adapted.blocks.named_modules(prefix="blocks")
            if isinstance(m, nn.Linear)
        }
    )
    results = []
    for model in (plain, adapted):
        y = model(images)
        nn.functional.cross_entropy(y, torch.arange(3)).backward()
        results.append({"y": y.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}})
    expected, got = results
    assert got.keys() == expected.keys() > {"efft.mhsa.C", "head.weight"}
    for name, value in got.items():
        assert (value - expected[name]).norm() <= 2e-2 * expected[name].norm(), name


def test_files_and_removal(adapted: nn.Module, backbone: Make, tiny_vit: Make, images: Tensor, tmp_path: Path) -> None:
    expected, base = adapted(images), backbone().train()(images)
    efft.save_adapter(adapted, tmp_path)
    torch.testing.assert_close(efft.load_adapter(backbone(), tmp_path)(images), expected)
    other = backbone()
    other.blocks[0].attn.qkv.weight.data[:8] ^= 1
    with pytest.raises(ValueError, match="the base weights are not those it was trained on"):
        efft.load_adapter(other, tmp_path)
    dense_base = efft.load_adapter(tiny_vit(), tmp_path)  # the adapter also fits the model that is not quantized
    assert (dense_base(images) - expected).norm() < 0.1 * expected.norm()
    kinds = {n: type(m) for n, m in backbone().named_modules()}
    assert {n: type(m) for n, m in efft.remove(adapted).named_modules()} == kinds
    torch.testing.assert_close(adapted(images), base)
    assert adapted.state_dict().keys() == backbone().train().state_dict().keys()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies(
    duplicate: Callable[[nn.Module], nn.Module], adapted: nn.Module, images: Tensor, randomize: Make
) -> None:
    expected = adapted(images)
    twin = duplicate(adapted)
    assert torch.equal(twin(images), expected)
    randomize(twin, seed=9)
    assert not torch.allclose(twin(images), expected, atol=1e-3)
    assert torch.equal(adapted(images), expected)


def test_merging_is_refused(adapted: nn.Module, images: Tensor) -> None:
    expected = adapted(images)
    for merge in (efft.merge, efft.merged_state_dict):
        with pytest.raises(TypeError, match="cannot hold an update"):
            merge(adapted)
        with pytest.raises(TypeError, match="load it onto a base that is not quantized, and merge there"):
            merge(adapted, dequantize=True)
    assert torch.equal(adapted(images), expected)


def test_a_pool_over_it(adapted: nn.Module, backbone: Make, images: Tensor) -> None:
    pool = efft.AdapterPool(backbone())
    pool.add("a", adapted)
    with torch.no_grad(), pool.use(["a", None, "a"]) as model:
        rows = model(images)
        want = torch.stack([adapted(images)[0], backbone().train()(images)[1], adapted(images)[2]])
    torch.testing.assert_close(rows, want, rtol=1e-4, atol=1e-4)


def test_under_peft(backbone: Make, images: Tensor) -> None:
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'efft-kernels[hf]'")
    from efft.integrations.peft import EfftPeftConfig

    model = peft.get_peft_model(backbone(), EfftPeftConfig(rank=4))
    assert torch.equal(model(images), backbone()(images))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "efft_" in name:
                parameter.normal_(std=0.2)
    model(images).sum().backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if "efft_" in n)
    with pytest.raises(TypeError, match="to which no update can be added: keep the adapter unmerged"):
        model.merge_adapter()
