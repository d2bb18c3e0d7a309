"""Test the methods other than EFFT, such as LoRA and FacT.

Every method must adapt a model, train, save, load, merge, export, count its parameters, compile, and restore the model.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import efft
from efft import methods
from efft.adapting.inject import adapted_layers
from efft.config import AdapterConfig
from efft.params import count_plan
from efft.planning.plan import make_plan
from tests.adapter_files import edit_config

Make = Callable[..., nn.Module]

R = 4
D, L, H = 16, 2, 2  # width, blocks and heads of the tiny ViT; the MLP is 4 D wide
SHAPES = ((D, 3 * D), (D, D), (D, 4 * D), (4 * D, D))  # qkv, o, fc1, fc2
FACTORS = {16: (2, 2, 4), 48: (3, 4, 4), 64: (4, 4, 4)}  # factorizations of the sizes


def train(*sizes: int) -> int:
    """Return the number of parameters of a tensor train whose outer ranks are 1 and whose inner ranks are R."""
    first, *inner, last = sizes
    return first * R + sum(inner) * R**2 + R * last


#: The configuration, and the number of trainable parameters by the formula in the method's paper.
METHODS: dict[str, tuple[AdapterConfig, int]] = {
    "lora": (methods.LoRAConfig(rank=R, scale=0.7), L * sum(R * (m + n) for m, n in SHAPES)),
    "fact_tt": (methods.FacTTTConfig(rank=R, scale=0.7), 2 * D * R + 12 * L * R**2),
    "fact_tk": (methods.FacTTKConfig(rank=R, scale=0.7), 2 * D * R + 12 * L * R + R**3),
    "lotr": (methods.LoTRConfig(rank=R, scale=0.7), sum(R * (m + n) + L * R**2 for m, n in SHAPES)),
    "metatt_4d": (methods.MetaTT4DConfig(rank=R, scale=0.7), 2 * D * R + (L + 12) * R**2),
    "metatt_5d": (methods.MetaTT5DConfig(rank=R, scale=0.7), (D + D // H) * R + (L + 12 + H) * R**2),
    "lorta": (methods.LoRTAConfig(rank=R, scale=0.7), R * (D + D // H + L + 12 + H)),
    "tenslora": (
        methods.TensLoRAConfig(ranks=[4, 3, 2, 2], targets="all", scale=0.7),
        4 * 3 * 2 * 2 + 4 * D + 3 * D + 2 * 12 + 2 * L,
    ),
    "tt_lora": (methods.TTLoRAConfig(rank=R, scale=0.7), L * sum(train(*FACTORS[m], *FACTORS[n]) for m, n in SHAPES)),
    "loretta_rep": (
        methods.LoRETTARepConfig(rank=R, bottleneck=6, scale=0.7),
        L * sum(train(*FACTORS[m], 6) + train(6, *FACTORS[n]) for m, n in SHAPES),
    ),
    "loretta_adp": (
        methods.LoRETTAAdpConfig(rank=R, bottleneck=6, scale=0.7),
        L * 2 * (train(*FACTORS[D], 6) + train(6, *FACTORS[D]) + 6 + D),
    ),
    "lora_xs": (methods.LoRAXSConfig(rank=R, scale=0.7), L * 4 * R**2),
    "vera": (methods.VeRAConfig(rank=R, scale=0.7), L * sum(R + n for _, n in SHAPES)),
}


def config_of(name: str) -> AdapterConfig:
    return copy.deepcopy(METHODS[name][0])


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


NOT_MERGED = {"loretta_adp"}


@pytest.fixture(params=METHODS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def contract(name: str, show: Callable[..., None]) -> Callable[..., None]:
    """Return a function that records that the method fulfills one requirement, or a number for it."""
    return lambda column, value="yes": show("Methods", name, column, value)


@pytest.fixture
def adapted(name: str, tiny_vit: Make, randomize: Callable[..., nn.Module]) -> nn.Module:
    """Return the tiny ViT in eval mode, adapted, with random factors."""
    return randomize(efft.apply(tiny_vit().eval(), config_of(name)))


def test_every_method_is_tested() -> None:
    assert set(METHODS) == set(methods.METHODS) - {"efft"}
    assert all(config.method == name for name, (config, _) in METHODS.items())


def test_nothing_changes_at_the_start(name: str, tiny_vit: Make, images: Tensor, contract: Callable[..., None]) -> None:
    model = tiny_vit().eval()
    before = model(images)
    efft.apply(model, config_of(name))
    if name not in NOT_MERGED:
        assert all(not layer.delta_weight().any() for layer in adapted_layers(model).values())
    torch.testing.assert_close(model(images), before)
    contract("apply")


def test_training_changes_the_factors_and_the_head_alone(
    name: str, tiny_vit: Make, images: Tensor, contract: Callable[..., None]
) -> None:
    model = efft.apply(tiny_vit(), config_of(name))
    before, labels = tensors(model), torch.tensor([0, 3, 1])
    optimizer = torch.optim.AdamW(efft.parameter_groups(model, lr=0.002))
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in efft.named_factors(model)} | {"head.weight", "head.bias"}
    assert {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])} == trained
    contract("train")


def test_every_factor_has_a_gradient(name: str, adapted: nn.Module, images: Tensor) -> None:
    adapted(images).square().sum().backward()
    used = {n: 0.0 if p.grad is None else p.grad.bool().double().mean() for n, p in efft.named_factors(adapted)}
    # The ReLU of loretta_adp blocks some gradients.
    assert [n for n, share in used.items() if share < (0.5 if name == "loretta_adp" else 1)] == []


def test_layers_that_run_again_in_backward(adapted: nn.Module, images: Tensor) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        adapted.train().set_grad_checkpointing(checkpointing)
        factors = [p for _, p in efft.named_factors(adapted)]
        return list(torch.autograd.grad(adapted(images).square().sum(), factors))

    torch.testing.assert_close(gradients(True), gradients(False))


def test_a_loaded_adapter_computes_the_same(
    name: str,
    adapted: nn.Module,
    tiny_vit: Make,
    images: Tensor,
    tmp_path: Path,
    contract: Callable[..., None],
) -> None:
    efft.save_adapter(adapted, tmp_path, info={"top-1": 0.5})
    fresh = tiny_vit().eval()
    torch.manual_seed(99)  # random numbers drawn during loading must not matter
    efft.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(images), adapted(images))
    assert type(fresh.efft.config) is type(METHODS[name][0])
    assert fresh.efft.config.to_dict() == adapted.efft.config.to_dict() | {"head": ["head"]}
    card = (tmp_path / "README.md").read_text()
    assert f"Method: {name} ([arXiv " in card
    efft.load_adapter(adapted, tmp_path)  # load_adapter also accepts an adapted model
    contract("save and load")


BEFORE = {  # for each method, a configuration, and a field that old files lack and that has this value for such files
    "lorta": (methods.LoRTAConfig(rank=R, scale=0.7, heads_on="output"), "heads_on"),
    "loretta_adp": (methods.LoRETTAAdpConfig(rank=R, bottleneck=6, scale=0.7, bias=False), "bias"),
}


@pytest.mark.parametrize("old", BEFORE)
def test_an_adapter_saved_before_a_field_was_there(
    old: str, tiny_vit: Make, randomize: Callable[..., nn.Module], images: Tensor, tmp_path: Path
) -> None:
    config, field = BEFORE[old]
    model = randomize(efft.apply(tiny_vit().eval(), config))
    efft.save_adapter(model, tmp_path)
    edit_config(tmp_path, lambda description: description["config"].pop(field))
    again = efft.load_adapter(tiny_vit().eval(), tmp_path)
    assert getattr(again.efft.config, field) == getattr(config, field)
    assert torch.equal(again(images), model(images))
    default = type(config)()
    assert getattr(default, field) != getattr(config, field)
    assert getattr(type(config).from_dict({"rank": R}), field) == getattr(default, field), (
        "outside of adapter files, a missing field has its current default"
    )


def test_an_adapter_saved_with_the_singular_values_on_the_other_side(
    tiny_vit: Make, randomize: Callable[..., nn.Module], images: Tensor, tmp_path: Path
) -> None:
    model = randomize(efft.apply(tiny_vit().eval(), config_of("lora_xs")))
    for layer in adapted_layers(model).values():
        A, B = layer.factors.A[layer.site], layer.factors.B[layer.site]
        sigma = A.norm(dim=0)
        A /= sigma
        B *= sigma[:, None]
    efft.save_adapter(model, tmp_path)
    assert torch.equal(efft.load_adapter(tiny_vit().eval(), tmp_path)(images), model(images))


def test_merging(name: str, adapted: nn.Module, images: Tensor, contract: Callable[..., None]) -> None:
    if name in NOT_MERGED:
        pytest.skip("the method has a nonlinearity and cannot be merged: see test_adapters_are_not_merged")
    before, weights = adapted(images), tensors(adapted)
    assert "nothing" not in str(efft.merge(adapted))
    assert not torch.equal(adapted.blocks[0].attn.qkv.weight, weights["blocks.0.attn.qkv.weight"])
    merged = adapted(images)
    torch.testing.assert_close(merged, before, rtol=1e-4, atol=1e-4)
    efft.unmerge(adapted)
    assert torch.equal(adapted(images), before)
    assert all(torch.equal(t, weights[n]) for n, t in adapted.state_dict().items())
    contract("merged - unmerged", (merged - before).abs().max().item())


def test_merged_state_dict_is_that_of_the_plain_model(
    name: str, adapted: nn.Module, tiny_vit: Make, images: Tensor
) -> None:
    if name in NOT_MERGED:
        pytest.skip("the method has a nonlinearity and cannot be merged: see test_adapters_are_not_merged")
    plain = tiny_vit().eval()
    plain.load_state_dict(efft.merged_state_dict(adapted))
    torch.testing.assert_close(plain(images), adapted(images), rtol=1e-4, atol=1e-4)


def test_export_as_lora(name: str, adapted: nn.Module, tmp_path: Path) -> None:
    if name in NOT_MERGED:
        with pytest.raises(ValueError, match="is not an update of a weight, so it cannot be merged, shown or export"):
            efft.export_lora(adapted, tmp_path)
        assert not list(tmp_path.iterdir())
        return
    efft.export_lora(adapted, tmp_path)
    lora = load_file(tmp_path / "adapter_model.safetensors")
    for layer_name, layer in adapted_layers(adapted).items():
        A, B = (lora[f"base_model.model.{layer_name}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(B @ A, layer.delta_weight())


def test_adapters_are_not_merged(tiny_vit: Make, randomize: Callable[..., nn.Module], images: Tensor) -> None:
    model = randomize(efft.apply(tiny_vit().eval(), config_of("loretta_adp")))
    before = model(images)
    for call in (efft.merge, efft.merged_state_dict):
        with pytest.raises(ValueError, match="an adapter with a nonlinearity is not an update of a weight"):
            call(model)
    assert torch.equal(model(images), before)
    with efft.disabled(model):
        torch.testing.assert_close(model(images), tiny_vit().eval()(images))


def test_removing(adapted: nn.Module, tiny_vit: Make, images: Tensor, contract: Callable[..., None]) -> None:
    plain = tiny_vit().eval()
    efft.remove(adapted)
    state = plain.state_dict()
    assert adapted.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[n]) for n, t in adapted.state_dict().items())
    assert torch.equal(adapted(images), plain(images))
    contract("remove")


def test_number_of_parameters(name: str, tiny_vit: Make, contract: Callable[..., None]) -> None:
    model, config = tiny_vit(), config_of(name)
    planned = count_plan(model, make_plan(model, config))
    assert planned.factors == METHODS[name][1]
    assert efft.count_parameters(efft.apply(model, config)) == planned
    contract("parameters, as by the formula", planned.factors)


def test_config_goes_through_its_dict(name: str) -> None:
    config = config_of(name)
    config.exclude = ["blocks.0.mlp.fc1"]
    again = methods.config_from_dict(config.to_dict())
    assert (type(again), again) == (type(config), config)


def test_a_staged_model(name: str, tiny_swin: Make, randomize: Callable[..., nn.Module]) -> None:
    model, x = tiny_swin().eval(), torch.randn(2, 3, 32, 32)
    before = model(x)
    randomize(efft.apply(model, config_of(name)))
    assert any(group.startswith("stage4_") for group in model.efft)
    assert not torch.allclose(model(x), before)


def test_part_of_the_layers(name: str, tiny_vit: Make, randomize: Callable[..., nn.Module], images: Tensor) -> None:
    config = config_of(name)
    config.targets, config.exclude = ["attn.qkv", "attn.proj"], ["blocks.0.attn.proj"]
    model = tiny_vit().eval()
    before = model(images)
    randomize(efft.apply(model, config))
    assert set(model.efft.layers) == {"blocks.0.attn.qkv", "blocks.1.attn.qkv", "blocks.1.attn.proj"}
    assert not torch.allclose(model(images), before)


@pytest.mark.slow
def test_compiles_without_graph_breaks(adapted: nn.Module, images: Tensor, contract: Callable[..., None]) -> None:
    expected = adapted(images)
    torch._dynamo.reset()  # dynamo creates at most 8 graphs per function, and every method needs a new graph
    compiled = torch.compile(adapted, fullgraph=True, backend="aot_eager")
    actual = compiled(images)
    torch.testing.assert_close(actual, expected)
    factors = [p for _, p in efft.named_factors(adapted)]
    gradients: list[Any] = [torch.autograd.grad(y.square().sum(), factors) for y in (actual, adapted(images))]
    torch.testing.assert_close(*gradients)
    contract("one piece for torch.compile")


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown method 'prefix'; this version knows efft, lora, "):
        methods.config_from_dict({"method": "prefix"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "LoRAConfig.rank must be an integer from 1 to 65536, got 0"),
        ({"scale": float("nan")}, "LoRAConfig.scale must be a number from -1000000 to 1000000, got nan"),
        ({"targets": 3}, "LoRAConfig.targets must be 'all', 'all-linear', 'mhsa', 'ffn' or a list"),
        ({"head": 3}, "LoRAConfig.head must be None or a list of module names, got 3"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        methods.LoRAConfig(**values)


def test_the_page_on_adding_a_method(
    tiny_vit: Make, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[3] / "docs" / "add-a-method.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) < 80
    (tmp_path / "tied_lora.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    config = importlib.import_module("tied_lora").TiedLoRAConfig(rank=R)
    monkeypatch.setitem(methods.METHODS, config.method, type(config))
    model = tiny_vit().eval()
    before = model(images)
    efft.apply(model, config)
    torch.testing.assert_close(model(images), before)
    assert efft.count_parameters(model).factors == sum(R * (m + n) + L * (R + n) for m, n in SHAPES)
    with torch.no_grad():
        for _, factor in efft.named_factors(model):
            factor.add_(0.1)
    fresh = efft.load_adapter(tiny_vit().eval(), efft.save_adapter(model, tmp_path / "adapter"))
    assert torch.equal(fresh(images), model(images))
    assert not torch.allclose(model(images), before)
