"""Test every baseline method: parameter count, initial output, trained parameters, gradients, formulas, and errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from efft import count_parameters
from efft_lab import baselines
from efft_lab.baselines.vit import blocks

pytest.importorskip("timm", reason="needs the vision extra")
pytest.importorskip("peft", reason="peft_lora needs the compare extra")

D, DEPTH, HEAD, PATCH = 16, 2, 16 * 5 + 5, 8  # width, blocks, parameters of the head and patch size of the tiny ViT
BIASES = D + DEPTH * (D + 3 * D + D + D + 4 * D + D) + D  # patches; norm1, qkv, proj, norm2, fc1, fc2; last norm
NORMS = (2 * DEPTH + 1) * D  # weights of normalization layers
COUNTS = [
    ("adapter", {}, DEPTH * (2 * D * 8 + 8 + D)),
    ("adapter", {"width": 3}, DEPTH * (2 * D * 3 + 3 + D)),
    ("adaptformer", {}, DEPTH * (2 * D * 8 + 8 + D)),
    ("bitfit", {}, BIASES),
    ("bitfit", {"norms": True}, BIASES + NORMS),
    ("ssf", {}, 2 * BIASES),  # a scale and a shift for every bias
    ("vpt_deep", {"tokens": 4}, DEPTH * 4 * D),
    ("peft_lora", {}, DEPTH * 8 * (D + 3 * D)),
    ("peft_lora", {"rank": 2, "targets": ["qkv", "proj", "fc1", "fc2"]}, DEPTH * 2 * (4 * D + 2 * D + 5 * D + 5 * D)),
    ("peft_lora", {"bias": "lora_only"}, DEPTH * (8 * (D + 3 * D) + 3 * D)),
    ("peft_lora", {"bias": "all"}, DEPTH * 8 * (D + 3 * D) + BIASES),
    ("peft_lora", {"bias": "all", "norms": True}, DEPTH * 8 * (D + 3 * D) + BIASES + NORMS),
    ("peft_lora", {"norms": True}, DEPTH * 8 * (D + 3 * D) + 2 * NORMS),
]
NO_OP = ["adapter", "adaptformer", "bitfit", "peft_lora"]
Make = Callable[..., nn.Module]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("name", "settings", "count"), COUNTS)
def test_parameter_count(name: str, settings: dict[str, Any], count: int, tiny_vit: Make) -> None:
    model = baselines.apply(name, tiny_vit(), settings)
    assert sum(p.numel() for p in trained(model).values()) == count + HEAD
    assert count_parameters(model).head == count + HEAD


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("adapter", 0.16),
        ("adaptformer", 0.16),
        ("bitfit", 0.10),
        ("ssf", 0.21),
        ("peft_lora", 0.29),
        ("vpt_deep", 0.09),
    ],
)
def test_defaults_have_the_published_size_on_vit_b(name: str, published: float) -> None:
    """The sizes are in millions of parameters, without the head.

    VPT-deep uses only 10 tokens here. Its published sizes, 0.53 to 0.64, are for 1 to 100 tokens.
    """
    import timm

    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=10)
        baselines.apply(name, model, {})
    own = sum(p.numel() for p in trained(model).values()) - (768 * 10 + 10)
    assert round(own / 1e6, 2) == published


@pytest.mark.parametrize("name", NO_OP)
def test_first_step_is_that_of_the_base(name: str, tiny_vit: Make, images: Tensor) -> None:
    expected = tiny_vit().eval()(images)
    torch.testing.assert_close(baselines.apply(name, tiny_vit(), {}).eval()(images), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", baselines.names())
def test_only_its_parameters_train(name: str, tiny_vit: Make, images: Tensor) -> None:
    model = baselines.apply(name, tiny_vit(), {}).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # a matrix before one that starts at zero has no gradient in the first step
        optimizer.zero_grad()
        functional.cross_entropy(model(images), torch.tensor([0, 1, 2])).backward()
        optimizer.step()
    own = trained(model)
    assert {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])} == set(own)
    # Gradients of LoRA and of key biases can be tiny, but every parameter gets one.
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in own.values())
    base = tiny_vit().state_dict()
    assert len(before) == len(base) + len(own) - len(own.keys() & base.keys())


@pytest.mark.parametrize("name", baselines.names())
def test_other_models_are_refused(name: str) -> None:
    import timm

    model = timm.create_model("resnet18", num_classes=3)
    if name == "bitfit":
        baselines.apply(name, model, {})  # a model of any architecture has biases
        return
    with pytest.raises(ValueError, match="this method supports only timm's ViTs, got a ResNet that has no blocks"):
        baselines.apply(name, model, {})


def test_blocks_of_another_build_are_refused() -> None:
    model = nn.Module()
    model.blocks = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"got a Module whose blocks lack attn\.proj, attn\.qkv, mlp\.fc1"):
        blocks(model)


def test_unknown_settings_are_refused(tiny_vit: Make) -> None:
    with pytest.raises(ValueError, match="method 'adapter' has no setting 'rank'; it has: width"):
        baselines.apply("adapter", tiny_vit(), {"rank": 3})
    with pytest.raises(ValueError, match="method 'bitfit' has no setting 'rank'; it has: norms"):
        baselines.apply("bitfit", tiny_vit(), {"rank": 3})
    with pytest.raises(ValueError, match=r"targets must be a list of qkv, proj, fc1, fc2, got \['head'\]"):
        baselines.apply("peft_lora", tiny_vit(), {"targets": ["head"]})


def randomized(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def test_bottlenecks_against_their_formulas(tiny_vit: Make) -> None:
    z = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(4))
    for name in ("adapter", "adaptformer"):
        model: Any = randomized(baselines.apply(name, tiny_vit(), {}))
        mlp = model.blocks[1].mlp
        h = mlp.fc2(functional.gelu(mlp.fc1(z)))
        part = getattr(mlp, name)
        x, act, s = (h, functional.gelu, 1.0) if name == "adapter" else (z, functional.relu, 0.1)
        hidden = act(x @ part.down.weight.T + part.down.bias)
        torch.testing.assert_close(mlp(z), h + s * (hidden @ part.up.weight.T + part.up.bias))


def test_scales_and_shifts_fold_into_the_weights(tiny_vit: Make, images: Tensor) -> None:
    """SSF equals a plain ViT whose weights and biases are multiplied by gamma, with beta added to the biases."""
    model = randomized(baselines.apply("ssf", tiny_vit(), {}))
    state = model.state_dict()
    for name in [name.removesuffix(".ssf.gamma") for name in state if name.endswith(".ssf.gamma")]:
        site = f"{name}.proj" if name == "patch_embed" else name
        gamma, weight = state[f"{name}.ssf.gamma"], state[f"{site}.weight"]
        state[f"{site}.weight"] = weight * gamma.reshape(-1, *[1] * (weight.ndim - 1))
        state[f"{site}.bias"] = state[f"{site}.bias"] * gamma + state[f"{name}.ssf.beta"]
    plain = tiny_vit().eval()
    plain.load_state_dict({name: value for name, value in state.items() if ".ssf." not in name})
    torch.testing.assert_close(model(images), plain(images))


def test_prompts_against_a_loop_over_the_blocks(tiny_vit: Make, images: Tensor) -> None:
    model: Any = randomized(baselines.apply("vpt_deep", tiny_vit(), {"tokens": 4}))
    plain: Any = tiny_vit().eval()
    plain.head.load_state_dict(model.head.state_dict())
    x = plain._pos_embed(plain.patch_embed(images))
    for block, own in zip(plain.blocks, model.blocks, strict=True):
        prompts = own.prompt.tokens.expand(3, -1, -1)
        x = block(torch.cat([x[:, :1], prompts, x[:, 1:]], dim=1))
        x = torch.cat([x[:, :1], x[:, 5:]], dim=1)
    torch.testing.assert_close(model(images), plain.forward_head(plain.norm(x)))


def test_peft_lora_against_its_formula(tiny_vit: Make) -> None:
    model: Any = randomized(baselines.apply("peft_lora", tiny_vit(), {"rank": 2, "alpha": 6}))
    layer, base = model.blocks[0].attn.qkv, tiny_vit().blocks[0].attn.qkv  # type: ignore[index,union-attr]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, D, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(layer(x), base(x) + 3 * x @ a.T @ b.T)
