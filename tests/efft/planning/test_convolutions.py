"""Test adapted convolutions: their tensor trains, and training, saving, merging, exporting and compiling a network."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import efft
from efft.adapting.inject import adapted_layers
from efft.methods import LoRAConfig, LoRETTAAdpConfig
from efft_kernels import EfftConv2d, EfftLinear

timm = pytest.importorskip("timm", reason="needs timm: pip install 'efft-kernels[vision]'")
TARGETS = [r"layer\d\.\d\.conv[12]", "downsample.1"]


def network() -> nn.Module:
    """Return a ResNet of four stages with one basic block each."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("test_resnet", num_classes=5)
    return model.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module) -> nn.Module:
    """Return the model with random factors."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.efft.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


def test_layers_of_one_shape_share_a_train() -> None:
    model = efft.apply(network(), efft.EfftConfig(targets=TARGETS, rank=4))
    layers = adapted_layers(model)
    assert len(layers) >= 8
    assert all(isinstance(layer, EfftConv2d) for layer in layers.values())
    for name, layer in layers.items():
        out, *kernel = layer.weight.shape
        assert layer.factors is model.efft[f"linear_{torch.Size(kernel).numel()}x{out}"], name
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        *(f"efft.{name}" for name, _ in model.efft.named_parameters()),
        *("fc.weight", "fc.bias"),
    }


def test_train_save_load_merge_remove(images: Tensor, tmp_path: Path) -> None:
    plain = network()
    base, before = plain(images), copy.deepcopy(plain.state_dict())
    model = efft.apply(plain, efft.EfftConfig(targets=TARGETS, rank=4, scale=2.0, dropout=0.0))
    torch.testing.assert_close(model(images), base)
    optimizer = torch.optim.AdamW(efft.parameter_groups(model, lr=1e-2, weight_decay=0.0), lr=1e-2)
    for _ in range(3):
        nn.functional.cross_entropy(model(images), torch.tensor([1, 3])).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = model(images).detach()
    assert (expected - base).norm() > 1e-2 * base.norm()
    efft.save_adapter(model, tmp_path)
    torch.testing.assert_close(efft.load_adapter(network(), tmp_path)(images), expected)
    dense = network()
    dense.load_state_dict(efft.merged_state_dict(model))
    torch.testing.assert_close(dense(images), expected)
    efft.merge(model)
    torch.testing.assert_close(model(images), expected)
    efft.remove(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if "fc" not in name)
    assert not any(isinstance(module, EfftConv2d) for module in model.modules())


@pytest.mark.slow
def test_channels_last_and_one_graph(images: Tensor) -> None:
    model = trained(efft.apply(network(), efft.EfftConfig(targets=TARGETS, rank=4)))
    expected = model(images)
    model = model.to(memory_format=torch.channels_last)
    last = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(last), expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(last), expected)


def test_other_methods(images: Tensor) -> None:
    model = efft.apply(network(), LoRAConfig(targets=TARGETS, rank=2))
    before = model(images)
    trained(model)
    expected = model(images)
    assert not torch.allclose(before, expected)
    efft.merge(model)
    torch.testing.assert_close(model(images), expected)
    with pytest.raises(ValueError, match="matches no linear layer"):  # LoRETTA supports only linear layers
        efft.apply(network(), LoRETTAAdpConfig(targets=TARGETS))


def test_exported_lora_runs_in_peft(images: Tensor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'efft-kernels[hf]'")
    model = trained(efft.apply(network(), efft.EfftConfig(targets=TARGETS, rank=4)))
    efft.export_lora(model, tmp_path)
    alone = peft.PeftModel.from_pretrained(network(), str(tmp_path)).eval()
    torch.testing.assert_close(alone(images), model(images))


def test_kernels_that_are_standardised_are_told_of_once_with_their_size(images: Tensor) -> None:
    """A module that standardizes its weight needs the dense sum of weight and update. One warning names its size."""
    model = efft.apply(timm.create_model("test_nfnet", num_classes=5), efft.EfftConfig(rank=2))
    read = {n: u for n, u in adapted_layers(model).items() if not isinstance(u, nn.Module)}
    size = 4 * sum(update.weight.numel() for update in read.values()) / 2**20
    n_all = len(adapted_layers(model))
    message = rf"{len(read)} of {n_all} adapted weights, 'stages.* read directly by ScaledStdConv2d, and"
    with pytest.warns(UserWarning, match=rf"{message} .* {size:.3g} MiB in all"):
        model(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images)
        model.eval()(images)
        efft.apply(network(), efft.EfftConfig(rank=2))(images)


def test_a_name_of_a_linear_layer_does_not_catch_convolutions() -> None:
    vit = timm.create_model("test_vit", num_classes=5)
    model = efft.apply(vit, efft.EfftConfig(targets=["proj"], rank=4))
    assert all(isinstance(layer, EfftLinear) for layer in adapted_layers(model).values())
    assert "patch_embed.proj" not in adapted_layers(model)


def test_depthwise_convolutions() -> None:
    model = timm.create_model("test_convnext", num_classes=5).eval()
    efft.apply(model, efft.EfftConfig.auto(targets=["stages.0.blocks.0.conv_dw"], rank=4))
    (layer,) = adapted_layers(model).values()
    assert layer.groups == layer.in_channels > 1
    for _, factor in efft.named_factors(model):
        torch.nn.init.normal_(factor)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        y = model(x)
        efft.merge(model)
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
