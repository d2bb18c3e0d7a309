"""Test ``targets="all"`` on tiny random models of transformers.

The tests cover the adapted layers, training, saving, merging and compiling, and methods that need the number of heads.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efft
from efft.methods import LoRTAConfig, MetaTT5DConfig, TensLoRAConfig
from efft.methods.base import HeadedConfig
from efft_kernels import EfftLinear

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'efft-kernels[hf]'")

Make = Callable[..., nn.Module]

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 5,
}
TEXT: dict[str, Any] = {
    "vocab_size": 50,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **{name: size for name, size in SIZES.items() if name not in ("image_size", "patch_size")},
}
DINOV2 = {**{name: size for name, size in SIZES.items() if name != "intermediate_size"}, "mlp_ratio": 2}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 2}
CLIP = {"vision_config": SIZES, "text_config": TEXT, "num_labels": 5}
ATTENTION = [f"attention.{part}_proj" for part in "qkvo"]
BERT = [f"attention.self.{part}" for part in ("query", "key", "value")] + ["attention.output.dense"]
MLP = ["mlp.fc1", "mlp.fc2"]
GATED = [f"mlp.{part}_proj" for part in ("gate", "up", "down")]

#: Model class, configuration, pattern of the block names, layers of each block, head.
MODELS: dict[str, tuple[str, dict[str, Any], str, list[str], list[str]]] = {
    "vit": ("ViTForImageClassification", SIZES, "vit.layers.{}", ATTENTION + MLP, ["classifier"]),
    "deit": (
        "DeiTForImageClassificationWithTeacher",
        SIZES,
        "deit.layers.{}",
        ATTENTION + MLP,
        ["cls_classifier", "distillation_classifier"],
    ),
    "beit": ("BeitForImageClassification", SIZES, "beit.layers.{}", ATTENTION + MLP, ["classifier"]),
    "dinov2": ("Dinov2ForImageClassification", DINOV2, "dinov2.encoder.layer.{}", ATTENTION + MLP, ["classifier"]),
    "dinov2_giant": (
        "Dinov2ForImageClassification",
        {**DINOV2, "use_swiglu_ffn": True},
        "dinov2.encoder.layer.{}",
        ATTENTION + GATED,
        ["classifier"],
    ),
    "dinov3": ("DINOv3ViTModel", SIZES, "model.layer.{}", [*ATTENTION, "mlp.up_proj", "mlp.down_proj"], []),
    "dinov3_gated": ("DINOv3ViTModel", {**SIZES, "use_gated_mlp": True}, "model.layer.{}", ATTENTION + GATED, []),
    "clip": (
        "CLIPForImageClassification",
        CLIP,
        "vision_model.encoder.layers.{}",
        [f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")] + MLP,
        ["classifier"],
    ),
    "swin": (
        "SwinForImageClassification",
        {**SWIN, "num_labels": 5, "drop_path_rate": 0.0},
        "swin.encoder.layers.{}.blocks.{}",
        ATTENTION + MLP,
        ["classifier"],
    ),
    "bert": (
        "BertForSequenceClassification",
        TEXT,
        "bert.encoder.layer.{}",
        [*BERT, "intermediate.dense", "output.dense"],
        ["classifier"],
    ),
    "llama": ("LlamaForCausalLM", TEXT, "model.layers.{}", [f"self_attn.{p}_proj" for p in "qkvo"] + GATED, []),
    "llama_grouped": (
        "LlamaForSequenceClassification",
        {**TEXT, "num_key_value_heads": 1},
        "model.layers.{}",
        [f"self_attn.{part}_proj" for part in "qkvo"] + GATED,
        ["score"],
    ),
}


def make(name: str) -> nn.Module:
    kind, sizes = MODELS[name][:2]
    if not hasattr(transformers, kind):
        pytest.skip(f"this version of transformers has no class {kind}")
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    model: nn.Module = model_class(model_class.config_class(**copy.deepcopy(sizes))).eval()
    return model


def inputs(name: str) -> dict[str, Tensor]:
    if "vocab_size" in MODELS[name][1]:
        return {"input_ids": torch.arange(3, 17).view(2, 7)}
    pixels = SWIN["image_size"] if name == "swin" else SIZES["image_size"]
    return {"pixel_values": torch.randn(2, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))}


def run(name: str, model: nn.Module) -> Tensor:
    output = model(**inputs(name))
    y: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return y


@pytest.mark.parametrize("name", MODELS)
def test_all_of(name: str, randomize: Make, tmp_path: Path) -> None:
    """A new adapter has no effect, every layer of every block is adapted, and every factor has a gradient."""
    _, _, block, endings, head = MODELS[name]
    model = make(name)
    with torch.no_grad():
        base = run(name, model)
    efft.apply(model, efft.EfftConfig(rank=(2, 3), dropout=0.0))
    blocks = [(i, j) for i in (0, 1) for j in (0, 1)] if name == "swin" else [(0,), (1,)]
    assert sorted(model.efft.layers) == sorted(
        f"{block.format(*index)}.{ending}" for index in blocks for ending in endings
    )
    assert model.efft.head == head
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # for example, a warning about layers that did not run
        torch.testing.assert_close(run(name, model), base, rtol=1e-6, atol=1e-7)

    randomize(model)
    y = run(name, model)
    assert (y - base).abs().max() > 0.1 * base.abs().max()
    y.square().sum().backward()
    for factor, parameter in efft.named_factors(model):
        assert parameter.grad is not None, factor
        assert parameter.grad.flatten(0, -3).any(-1).any(-1).all() if factor.endswith("C") else parameter.grad.any()
    efft.save_adapter(model, tmp_path)
    again = efft.load_adapter(make(name), tmp_path)
    assert torch.equal(run(name, again), y)
    efft.merge(again)
    torch.testing.assert_close(run(name, again), y, rtol=1e-4, atol=1e-4 * float(base.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_compiles_without_graph_breaks(name: str, graph_breaks: Callable[..., int], show: Callable[..., None]) -> None:
    breaks = graph_breaks(efft.apply(make(name), efft.EfftConfig(rank=2)), **inputs(name))
    show("Adapted models under torch.compile", f"transformers, {name}", "graph breaks", breaks)
    assert breaks == 0


def test_grouped_queries_use_the_first_columns(randomize: Make) -> None:
    """k and v have half of q's outputs: they use V's first columns and separate cores."""
    model = randomize(efft.apply(make("llama_grouped"), efft.EfftConfig(rank=(2, 3))))
    mhsa, ffn = model.efft["mhsa"], model.efft["ffn"]
    assert (mhsa.C.shape, mhsa.V.shape) == ((2, 4, 2, 3), (3, 16))
    assert (ffn.C.shape, ffn.V.shape) == ((2, 3, 2, 3), (3, 32)), (
        "each block must have three cores for up, gate and down"
    )
    block = model.model.layers[1]
    with torch.no_grad():
        for core, (name, width) in enumerate({"q": 16, "k": 8, "v": 8, "o": 16}.items()):
            layer = getattr(block.self_attn, f"{name}_proj")
            assert isinstance(layer, EfftLinear)
            torch.testing.assert_close(layer.delta_weight(), (mhsa.U @ mhsa.C[1, core] @ mhsa.V[:, :width]).t())
        for core, name in enumerate(("up", "gate")):
            delta = getattr(block.mlp, f"{name}_proj").delta_weight()
            torch.testing.assert_close(delta, (ffn.U @ ffn.C[1, core] @ ffn.V).t())
        torch.testing.assert_close(block.mlp.down_proj.delta_weight(), ffn.U @ ffn.C[1, 2] @ ffn.V)


def test_efft1_of_a_gated_model(randomize: Make) -> None:
    """Attention and MLP share one tensor train if the MLP is four times as wide as the model."""
    config = transformers.LlamaConfig(**{**TEXT, "intermediate_size": 64, "num_key_value_heads": 1})
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(config).eval()
    randomize(efft.apply(model, efft.EfftConfig(variant="efft1", rank=2)))
    bank = model.efft["joint"]
    assert bank.C.shape == (2, 4, 2, 2)
    train = [(bank.U @ bank.C[0, core] @ bank.V).t() for core in range(4)]  # [64, 16]
    block = model.model.layers[0]
    for name, first, last in (("q", 0, 16), ("k", 16, 24), ("v", 32, 40), ("o", 48, 64)):
        delta = getattr(block.self_attn, f"{name}_proj").delta_weight()
        torch.testing.assert_close(delta, train[0][first:last])
    torch.testing.assert_close(block.mlp.up_proj.delta_weight(), train[1])
    torch.testing.assert_close(block.mlp.gate_proj.delta_weight(), train[2])
    torch.testing.assert_close(block.mlp.down_proj.delta_weight(), train[3].t())


@pytest.mark.parametrize(
    "config",
    [LoRTAConfig(), MetaTT5DConfig(), TensLoRAConfig(tensor="att_qkv", targets="all")],
    ids=lambda config: config.method,
)
@pytest.mark.parametrize("name", ["vit", "bert", "clip", "llama", "swin"])
def test_the_number_of_heads_is_the_models(name: str, config: HeadedConfig, randomize: Make) -> None:
    model = make(name)
    heads = SWIN["num_heads"] if name == "swin" else [SIZES["num_attention_heads"]]
    if name == "swin":  # the MLPs of a stage do not know its number of heads
        config = dataclasses.replace(config, targets="mhsa")
    efft.apply(model, config)
    modes = {"lorta": "C_h", "metatt_5d": "G4"}
    found = [
        bank.modes["att"].shape[-2] if config.method == "tenslora" else getattr(bank, modes[config.method]).shape[0]
        for bank in model.efft.values()
    ]
    assert found == heads
    before = run(name, model)
    assert not torch.allclose(run(name, randomize(model)), before)


def test_heads_that_no_module_names_must_be_given(tiny_vit: Make) -> None:
    model = tiny_vit()
    for block in model.blocks:
        del block.attn.num_heads
    with pytest.raises(ValueError, match=r"expected one number of heads .* around blocks\.0\.attn\.qkv, .*set heads="):
        efft.apply(model, LoRTAConfig())
    efft.apply(model, LoRTAConfig(heads=4))
    assert model.efft["joint"].C_h.shape[0] == 4
