"""Test biases and norms that are trained in addition to the factors: their selection, training, saving and removal."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efft
from efft.adapting.inject import adapter_of
from efft.planning.extras import is_norm
from tests.efft.adapting.conftest import ALL

Make = Callable[..., nn.Module]


class Rms(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


# --- selection --------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Hold two blocks of a norm and two linear layers."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8, bias=bias), nn.Linear(8, 8, bias=bias)) for _ in range(2)
        )


@pytest.mark.parametrize("bias", [False, True])
def test_auto_takes_the_biases_of_adapted_layers(bias: bool, tmp_path: Path) -> None:
    model = efft.apply(Plain(bias), efft.EfftConfig.auto(rank=2, head=[]))
    assert adapter_of(model).extras == [f"blocks.{i}.{j}.bias" for i in (0, 1) for j in (1, 2)] * bias
    efft.save_adapter(model, tmp_path)
    again = efft.load_adapter(Plain(bias), tmp_path)
    assert (adapter_of(again).config, adapter_of(again).extras) == (adapter_of(model).config, adapter_of(model).extras)


def test_auto_leaves_out_the_biases_of_queries_keys_and_values(tiny_vit: Make, images: Tensor) -> None:
    """A bias of the keys has no effect on a softmax. A bias of the values acts like a bias of the output projection."""
    model = efft.apply(tiny_vit(), efft.EfftConfig.auto(rank=2))
    layers = ("attn.proj", "mlp.fc1", "mlp.fc2")
    assert adapter_of(model).extras == [f"blocks.{i}.{layer}.bias" for i in (0, 1) for layer in layers]
    dense: Any = tiny_vit().eval().double()
    attention, images = dense.blocks[0].attn, images.double()
    before = dense(images)
    shift = torch.randn(16, dtype=torch.float64)
    with torch.no_grad():
        attention.qkv.bias[16:32] += 1.0
        attention.qkv.bias[32:] += shift
        attention.proj.bias -= attention.proj.weight @ shift
    torch.testing.assert_close(dense(images), before)


def test_norms_by_structure() -> None:
    norms = [nn.LayerNorm(4), nn.LayerNorm((2, 4)), nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.RMSNorm(4), Rms(4)]
    others = [nn.Linear(4, 4), nn.PReLU(4), nn.Sequential(Rms(4)), nn.LayerNorm(4, elementwise_affine=False), nn.GELU()]
    assert all(map(is_norm, norms))
    assert not any(map(is_norm, others))


@pytest.mark.parametrize(
    ("fields", "per_block", "outside"),
    [
        ({"bias": "adapted"}, 48 + 16 + 64 + 16, 0),
        ({"bias": "all"}, 48 + 16 + 64 + 16 + 2 * 16, 16 + 16),
        ({"norms": True}, 4 * 16, 2 * 16),
        ({"bias": "all", "norms": True}, 48 + 16 + 64 + 16 + 4 * 16, 16 + 2 * 16),
        ({"bias": "adapted", "targets": "mhsa"}, 48 + 16, 0),
    ],
    ids=str,
)
def test_counts_by_formula(
    fields: dict[str, Any], per_block: int, outside: int, tiny_vit: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    config = efft.EfftConfig(rank=4, **fields)
    with torch.device("meta"):
        plan = efft.inspect(tiny_vit(), config)
    model = efft.apply(tiny_vit(), config)
    expected = 2 * per_block + outside
    assert sum(plan.extras.values()) == expected
    assert f"biases and norms: {expected:,} parameters" in str(plan)
    count = efft.count_parameters(model)
    assert count.extras == expected
    assert count.head == 16 * 5 + 5
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count.factors + count.head + count.extras == trainable
    assert count.backbone == sum(p.numel() for p in tiny_vit().parameters()) - count.head
    efft.print_trainable_parameters(model)
    printed = capsys.readouterr().out
    assert "biases and norms" in printed
    assert f"trainable params: {trainable:,d} || all params: {sum(p.numel() for p in model.parameters()):,d}" in printed


def test_nothing_more_is_trained_by_default(tiny_vit: Make) -> None:
    model = efft.apply(tiny_vit(), efft.EfftConfig(rank=4))
    assert adapter_of(model).extras == []
    assert "biases" not in str(efft.count_parameters(model)) + str(efft.inspect(tiny_vit()))


def test_packed_projections_have_their_biases() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.linear = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.attention(x, x, x, need_weights=False)[0])

    model = nn.Sequential(Block(), Block())
    efft.apply(model, efft.EfftConfig(rank=2, bias="adapted", head=[]))
    names = [f"{i}.attention.{name}" for i in range(2) for name in ("in_proj_bias", "out_proj.bias")]
    assert adapter_of(model).extras == names
    model(torch.randn(2, 3, 8)).square().sum().backward()
    assert all(dict(model.named_parameters())[name].grad.any() for name in names)


class Router(nn.Module):
    """Select experts by scores plus a bias that no gradient reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 2)
        self.expert_bias = nn.Parameter(torch.zeros(2), requires_grad=False)


@pytest.mark.parametrize("frozen", [False, True])
def test_biases_that_the_model_does_not_train_are_left_out(frozen: bool) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), Router()) for _ in range(2)))
    if frozen:  # then nothing tells which parameters the model trains
        model.requires_grad_(False)
    plan = efft.inspect(model, efft.EfftConfig(rank=1, bias="all", head=[]))
    names = ["0.bias", *["1.expert_bias"] * frozen, "1.gate.bias"]
    assert list(plan.extras) == [f"{i}.{name}" for i in range(2) for name in names]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bias": "some"}, "EfftConfig.bias must be one of 'none', 'all', 'adapted', 'auto', got 'some'"),
        ({"norms": 1}, "EfftConfig.norms must be a bool, got 1"),
    ],
)
def test_wrong_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        efft.EfftConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bias": "all"}, "bias='all' finds no bias to train"),
        ({"bias": "adapted"}, "bias='adapted' finds no bias in the adapted layers"),
        ({"norms": True}, "norms=True finds no normalization layer"),
    ],
)
def test_models_without_them(
    fields: dict[str, Any], message: str, unchanged: Callable[[nn.Module], AbstractContextManager[None]]
) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8, bias=False), nn.GELU()) for _ in range(2)))
    with unchanged(model), pytest.raises(ValueError, match=message):
        efft.apply(model, efft.EfftConfig(rank=2, head=[], **fields))


# --- training ---------------------------------------------------------------------------------------------------------


def test_first_step_is_a_no_op(tiny_vit: Make, images: Tensor) -> None:
    model = tiny_vit().eval()
    before = model(images)
    assert torch.equal(efft.apply(model, efft.EfftConfig(**ALL))(images), before)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_those_of_the_dense_model(fused: bool, trained: Make, tiny_vit: Make, images: Tensor) -> None:
    model = trained().double()
    dense = tiny_vit().eval().double()
    dense.load_state_dict(efft.merged_state_dict(model))
    if fused:
        efft.fuse(model)
    for m in (model, dense):
        m(images.double()).square().sum().backward()
    expected = dict(dense.named_parameters())
    names = adapter_of(model).extras
    assert len(names) == 2 * (4 + 4) + 1 + 2
    for name in names:
        got = dict(model.named_parameters())[name].grad
        torch.testing.assert_close(got, expected[name].grad, rtol=1e-10, atol=1e-12)


# --- the base ---------------------------------------------------------------------------------------------------------


def test_remove_restores_the_base(
    tiny_vit: Make, trained: Make, unchanged: Callable[[nn.Module], AbstractContextManager[None]], images: Tensor
) -> None:
    model = tiny_vit().eval()
    model.norm.requires_grad_(False)
    with unchanged(model):
        efft.apply(model, efft.EfftConfig(**ALL))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in adapter_of(model).extras:
                    parameter.add_(1)
        efft.remove(model)
    model = trained()
    head = model.head.state_dict()
    expected = tiny_vit().eval()
    expected.head.load_state_dict(head)
    assert torch.equal(efft.remove(model)(images), expected(images))


@pytest.mark.parametrize("merged", [False, True])
def test_disabled_computes_the_base(merged: bool, tiny_vit: Make, trained: Make, images: Tensor) -> None:
    model, base = trained(), tiny_vit().eval()
    if merged:
        efft.merge(model)
    before, state = model(images), {n: t.clone() for n, t in model.state_dict().items()}
    with efft.disabled(model):
        assert torch.equal(model(images), base(images))
    assert torch.equal(model(images), before)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_trained_values_are_not_mistaken_for_those_of_the_base(trained: Make, tiny_vit: Make, tmp_path: Path) -> None:
    """Within disabled, the model has the base's biases and norms, which must not be saved as trained ones."""
    model, state = trained(), trained().state_dict()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folder = efft.save_adapter(model, tmp_path / "earlier")
    operations: dict[str, Callable[[], Any]] = {
        "save_adapter": lambda: efft.save_adapter(model, tmp_path / "later"),
        "export_lora": lambda: efft.export_lora(model, tmp_path / "lora"),
        "merged_state_dict": lambda: efft.merged_state_dict(model),
        "parameter_groups": lambda: efft.parameter_groups(model, 1e-3),
        "load_adapter": lambda: efft.load_adapter(model, folder),
        "load_state_dict": lambda: model.load_state_dict(state),
        "AdapterPool.add": lambda: efft.AdapterPool(tiny_vit()).add("name", model),
        "remove": lambda: efft.remove(model),
    }
    with efft.disabled(model):
        for name, operation in operations.items():
            with pytest.raises(RuntimeError, match=f"{name}: within the with block of efft.disabled"):
                operation()
    assert [path.name for path in tmp_path.iterdir()] == ["earlier"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    efft.save_adapter(model, tmp_path / "later")


def test_a_graph_may_span_disabled(trained: Make, tiny_vit: Make, images: Tensor) -> None:
    """As in distillation, the base runs between the forward pass and the backward pass of the adapted model."""
    model = trained()
    model(images).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = model(images).square().sum()
    with efft.disabled(model), torch.no_grad():
        assert torch.equal(model(images), tiny_vit().eval()(images))
    loss.backward()
    assert all(torch.equal(p.grad, expected[n]) for n, p in model.named_parameters() if n in expected)


def test_a_base_that_is_loaded_later(tiny_vit: Make, images: Tensor) -> None:
    with torch.device("meta"):
        model = tiny_vit().eval()
    efft.apply(model, efft.EfftConfig(**ALL))
    model.to_empty(device="cpu")
    for factors in model.efft.values():
        factors.reset_parameters()
    with pytest.raises(ValueError, match=r"the base's values of 'patch_embed.proj.bias' are not known"):
        efft.remove(model)
    with pytest.raises(ValueError, match="are not known"), efft.disabled(model):
        pass
    base = tiny_vit().eval()
    model.load_state_dict(base.state_dict(), strict=False)
    with torch.no_grad():
        model.norm.weight.add_(1)
    with efft.disabled(model):
        assert torch.equal(model(images), base(images))
    assert not torch.equal(model(images), base(images))


def test_a_checkpoint_of_another_base(tiny_vit: Make, trained: Make, images: Tensor) -> None:
    """The weights of the checkpoint's base are loaded, but its biases and norms before training are not in the file."""
    source = trained()
    model = tiny_vit().eval()
    for parameter in model.parameters():
        parameter.data.mul_(0.9)
    efft.apply(model, efft.EfftConfig(**ALL))
    model.load_state_dict(source.state_dict())
    assert torch.equal(model(images), source(images))
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.proj\.bias' are not known, because a state dict"):
        efft.remove(model)
    with pytest.raises(ValueError, match="are not known"), efft.disabled(model):
        pass
    model.load_state_dict(tiny_vit().state_dict(), strict=False)
    model.load_state_dict(source.state_dict())
    with efft.disabled(model), efft.disabled(source):
        assert torch.equal(model(images), source(images))


def test_a_checkpoint_of_the_same_base(tiny_vit: Make, trained: Make, images: Tensor) -> None:
    source, model = trained(), efft.apply(tiny_vit().eval(), efft.EfftConfig(**ALL))
    model.load_state_dict({name: tensor.double() for name, tensor in source.state_dict().items()})
    with efft.disabled(model), efft.disabled(source):
        assert torch.equal(model(images), source(images))


def test_checkpoints_of_one_of_two_models(tiny_vit: Make, trained: Make, images: Tensor) -> None:
    pair = nn.ModuleDict({"one": efft.apply(tiny_vit().eval(), efft.EfftConfig(**ALL)), "other": trained()})
    state = pair.state_dict()
    base = {f"one.{name}": tensor for name, tensor in tiny_vit().state_dict().items()}
    pair.load_state_dict({n: t for n, t in state.items() if n.startswith("other.")} | base, strict=False)
    other: Any = pair["other"]
    with efft.disabled(other):
        expected = tiny_vit().eval().forward_features(images)
        assert torch.equal(other.forward_features(images), expected)


# --- merged, saved, copied --------------------------------------------------------------------------------------------


def test_merging_has_them_and_is_exactly_undone(trained: Make, tiny_vit: Make, images: Tensor) -> None:
    model, plain = trained(), tiny_vit().eval()
    before, state = model(images), {n: t.clone() for n, t in model.state_dict().items()}
    plain.load_state_dict(efft.merged_state_dict(model))
    torch.testing.assert_close(plain(images), before, rtol=1e-5, atol=1e-5)
    efft.merge(model)
    assert torch.equal(model(images), plain(images))
    efft.unmerge(model)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert torch.equal(model(images), before)


@pytest.mark.parametrize("fields", [{}, {"bias": "adapted", "norms": False}, {"bias": "none"}], ids=str)
def test_round_trip(fields: dict[str, Any], trained: Make, tiny_vit: Make, images: Tensor, tmp_path: Path) -> None:
    model, base = trained(**fields), tiny_vit().eval()
    folder = efft.save_adapter(model, tmp_path / "a")
    loaded = efft.load_adapter(tiny_vit().eval(), folder)
    assert torch.equal(loaded(images), model(images))
    assert adapter_of(loaded).extras == adapter_of(model).extras
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    with efft.disabled(loaded):
        torch.testing.assert_close(loaded.forward_features(images), base.forward_features(images), rtol=0, atol=0)
    again = efft.apply(tiny_vit().eval(), copy.deepcopy(adapter_of(model).config))
    assert torch.equal(efft.load_adapter(again, folder)(images), model(images))
    card = (folder / "README.md").read_text()
    assert "biases and norms" in card


def test_the_fingerprint_is_that_of_the_base(trained: Make, tiny_vit: Make, tmp_path: Path) -> None:
    plain = efft.save_adapter(efft.apply(tiny_vit(), efft.EfftConfig(rank=4)), tmp_path / "plain")
    bases = []
    for folder in (plain, efft.save_adapter(trained(), tmp_path / "extras")):
        bases.append(json.loads((folder / "adapter_config.json").read_text())["base"])
    assert bases[0] == bases[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["extras"].append("blocks.9.norm1.bias"), "it has no parameter 'blocks.9.norm1.bias'"),
        (lambda d: d["extras"].append("blocks.0.attn.qkv.weight"), "adapted or in the head too"),
        (lambda d: d["extras"].append("head.bias"), "adapted or in the head too"),
        (lambda d: d["extras"].pop(), "unexpected tensors: norm.bias"),
        (lambda d: d.update(extras="norm.bias"), "'extras' must be a list of names"),
        (lambda d: d["config"].update(bias="none", norms=False), "it has 'extras', which its 'config' does not train"),
    ],
)
def test_damaged_files(
    change: Callable[[Any], Any], message: str, trained: Make, tiny_vit: Make, tmp_path: Path, unchanged: Any
) -> None:
    folder = efft.save_adapter(trained(), tmp_path / "a")
    path = folder / "adapter_config.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))
    model = tiny_vit()
    with unchanged(model), pytest.raises(ValueError, match=message):
        efft.load_adapter(model, folder)


def test_another_configuration_is_refused(trained: Make, tiny_vit: Make, tmp_path: Path) -> None:
    folder = efft.save_adapter(trained(), tmp_path / "a")
    model = efft.apply(tiny_vit(), efft.EfftConfig(rank=4))
    with pytest.raises(ValueError, match="bias: model 'none', adapter 'all'"):
        efft.load_adapter(model, folder)


@pytest.mark.parametrize("kind", ["copy", "pickle"])
def test_copies_have_their_own(kind: str, trained: Make, tiny_vit: Make, images: Tensor) -> None:
    model = trained()
    twin = copy.deepcopy(model) if kind == "copy" else pickle.loads(pickle.dumps(model))
    expected = model(images)
    with torch.no_grad():
        model.norm.bias.add_(1)
    assert torch.equal(twin(images), expected)
    with efft.disabled(twin):
        assert torch.equal(twin(images), tiny_vit().eval()(images))
    efft.remove(twin)
    assert not torch.equal(model(images), expected)


def test_compiles_whole(trained: Make, images: Tensor, graph_breaks: Callable[..., int]) -> None:
    model = trained().train()
    assert graph_breaks(model, images) == 0
    torch.compiler.reset()
    model(images).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.compile(model, backend="aot_eager", fullgraph=True)(images).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_prune_keeps_them(trained: Make, images: Tensor) -> None:
    model = trained()
    norm = model.norm.weight.clone()
    efft.prune(model, keep=0.5)
    assert torch.equal(model.norm.weight, norm)
    assert model.norm.weight.requires_grad
