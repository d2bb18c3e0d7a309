"""Test adapters of quantized models, whose results must equal those of the same adapters on the dequantized weights.

Other tests cover adapter files, copies, merging and peft.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import efft
from efft_kernels.nn import frozen
from tests.quantized import ROUNDING_WAYS, WAYS, to_int8, to_nf4

Make = Callable[..., nn.Module]
Quantize = Callable[[nn.Linear], None]
CONFIG = {"rank": 4, "dropout": 0.0}


@pytest.fixture(params=WAYS)
def quantize(request: pytest.FixtureRequest) -> Quantize:
    return WAYS[request.param]


def backbone(model: nn.Module, quantize: Quantize) -> nn.Module:
    """Quantize all linear layers of the blocks, but not the head."""
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            quantize(module)
    return model


@pytest.fixture
def quantized(quantize: Quantize, tiny_vit: Make, randomize: Make) -> nn.Module:
    """Return a tiny ViT that was quantized and then adapted, with random factors."""
    model = efft.apply(backbone(tiny_vit(), quantize), efft.EfftConfig(**CONFIG))
    return randomize(model, std=0.2).eval()


def dequantized(model: nn.Module, make: Make) -> nn.Module:
    """Return a model of plain layers that has the same factors and the dequantized weights."""
    plain = efft.apply(make(), efft.EfftConfig(**CONFIG)).eval()
    state = model.state_dict()
    plain.load_state_dict({n: frozen.dequantized(t) for n, t in state.items()})
    return plain


def step(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    y = model(images)
    nn.functional.cross_entropy(y, torch.arange(3)).backward()
    return {"y": y.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def test_trains_as_with_the_dequantised_weights(quantized: nn.Module, tiny_vit: Make, images: Tensor) -> None:
    expected, got = step(dequantized(quantized, tiny_vit), images), step(quantized, images)
    assert got.keys() == expected.keys() > {"efft.mhsa.C", "head.weight"}
    for name, value in got.items():
        assert (value - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("way", ROUNDING_WAYS)
def test_trains_where_products_round_their_input(way: str, tiny_vit: Make, images: Tensor, randomize: Make) -> None:
    """These layers round their input, so the results differ slightly from those of dequantized weights."""
    model = randomize(efft.apply(backbone(tiny_vit(), ROUNDING_WAYS[way]), efft.EfftConfig(**CONFIG)), std=0.2).eval()
    expected, got = step(dequantized(model, tiny_vit), images), step(model, images)
    assert got.keys() == expected.keys() > {"efft.mhsa.C", "head.weight"}
    for name, value in got.items():
        assert 0 < (value - expected[name]).norm() <= 0.1 * expected[name].norm(), name


def test_quantising_an_adapted_model(quantize: Quantize, quantized: nn.Module, tiny_vit: Make, images: Tensor) -> None:
    later = efft.apply(tiny_vit(), efft.EfftConfig(**CONFIG)).eval()
    later.efft.load_state_dict(quantized.efft.state_dict())
    assert torch.equal(backbone(later, quantize)(images), quantized(images))
    assert "rank=(4, 4)" in repr(later)
    with efft.disabled(later):
        base = later(images)
    efft.remove(later)
    assert torch.equal(later(images), base)
    assert torch.equal(later(images), backbone(tiny_vit(), quantize).eval()(images))


def test_adapter_files(
    quantize: Quantize, quantized: nn.Module, tiny_vit: Make, images: Tensor, tmp_path: Path
) -> None:
    efft.save_adapter(quantized, tmp_path)
    again = efft.load_adapter(backbone(tiny_vit(), quantize), tmp_path).eval()
    assert torch.equal(again(images), quantized(images))
    with pytest.raises(ValueError, match="the base weights are not those it was trained on"):
        efft.load_adapter(tiny_vit(), tmp_path)


def test_copies(quantize: Quantize, quantized: nn.Module, images: Tensor, randomize: Make) -> None:
    if quantize is to_nf4:
        pytest.skip("torchao copies an NF4Tensor by quantizing its values again, so the copy differs")
    expected = quantized(images)
    twin = copy.deepcopy(quantized)
    assert torch.equal(twin(images), expected)
    randomize(twin, seed=9)
    assert not torch.allclose(twin(images), expected, atol=1e-3)
    assert torch.equal(quantized(images), expected)


def test_merging(quantized: nn.Module, tiny_vit: Make, images: Tensor) -> None:
    expected, weight = quantized(images), quantized.blocks[0].attn.qkv.weight
    for merge in (efft.merge, efft.merged_state_dict):
        with pytest.raises(TypeError, match=f"a {type(weight).__name__}\\) and cannot hold an update.*dequantize=True"):
            merge(quantized)
    assert quantized.blocks[0].attn.qkv.weight is weight
    plain = tiny_vit().eval()
    plain.load_state_dict(efft.merged_state_dict(quantized, dequantize=True))
    torch.testing.assert_close(plain(images), expected)
    efft.merge(quantized, dequantize=True)
    torch.testing.assert_close(quantized(images), expected)
    plain.load_state_dict(efft.merged_state_dict(quantized))
    torch.testing.assert_close(plain(images), expected)
    efft.unmerge(quantized)
    assert torch.equal(quantized(images), expected)


def test_a_quantised_head_is_refused(tiny_vit: Make) -> None:
    model = tiny_vit()
    to_int8(model.head)
    for adapt in (efft.apply, efft.freeze_backbone):
        with pytest.raises(ValueError, match="the head 'head' is to be trained, but has a Int8 for a weight"):
            adapt(model)
    efft.apply(model, efft.EfftConfig(rank=4, head=[]))


def test_under_peft(quantize: Quantize, tiny_vit: Make, images: Tensor) -> None:
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'efft-kernels[hf]'")
    from efft.integrations.peft import EfftPeftConfig

    model = peft.get_peft_model(backbone(tiny_vit(), quantize), EfftPeftConfig(rank=4)).eval()
    base = backbone(tiny_vit(), quantize).eval()(images)
    assert torch.equal(model(images), base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "efft_" in name:
                parameter.normal_(std=0.2)
    assert not torch.allclose(model(images), base, atol=1e-3)
    with pytest.raises(TypeError, match="to which no update can be added: keep the adapter unmerged"):
        model.merge_adapter()
