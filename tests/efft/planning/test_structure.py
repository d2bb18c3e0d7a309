"""Test models with unusual structures: the plan recognizes the structure, and every update has an effect."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import efft
from efft.methods import LoRAConfig
from efft.planning.structure import parts_of, structure_of


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.w2(self.w1(x).relu())
        return y


class Mixture(nn.Module):
    """Apply attention and a list of experts, like early versions of Mixtral."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({"q": nn.Linear(16, 16), "o": nn.Linear(16, 16)})
        self.experts = nn.ModuleList(Expert() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn["o"](self.self_attn["q"](x))
        return x + sum(expert(x) for expert in self.experts)


class Tail(nn.Sequential):
    """Apply layers in sequence. With this subclass, two parts of a model have different classes."""


class Held(nn.Module):
    """Call the modules in a plain list instead of the registered modules."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)]
        self.pair = {"last": (nn.Linear(16, 16),)}
        for i, layer in enumerate([*self.layers, *self.pair["last"]]):
            self.add_module(str(i), layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.layers, *self.pair["last"]]:
            x = layer(x)
        return x


def randomize(model: nn.Module) -> None:
    torch.manual_seed(3)
    for _, factor in efft.named_factors(model):
        nn.init.normal_(factor, std=0.5)


def test_experts_in_a_list_belong_to_the_mlp() -> None:
    model = nn.Sequential(Mixture(), Mixture())
    parts = parts_of(model, structure_of(model).weights)
    assert {name for name, part in parts.items() if part == "mhsa"} == {
        f"{i}.self_attn.{n}" for i in range(2) for n in "qo"
    }
    plan = efft.inspect(model, efft.EfftConfig(rank=2, targets="ffn", head=[]))
    assert set(plan.weights) == {f"{i}.experts.{j}.w{k}" for i in range(2) for j in range(3) for k in (1, 2)}


@pytest.mark.parametrize("n", [1, 2])
def test_a_list_of_one_block_is_planned_as_one_of_two(n: int) -> None:
    """The plan must recognize the block and leave the other layers of the model alone."""
    model = nn.ModuleDict({"layers": nn.ModuleList(Expert() for _ in range(n)), "pooler": nn.Linear(16, 16)})
    plan = efft.inspect(model, efft.EfftConfig(rank=2, head=[]))
    assert set(plan.weights) == {f"layers.{i}.w{k}" for i in range(n) for k in (1, 2)}


def test_sizes_that_are_tensors_are_numbers_in_the_plan() -> None:
    """Some models compute their widths with torch, so the sizes of layers are tensors."""
    width = torch.tensor(48)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(width // 3, width), nn.Linear(width, width // 3)) for _ in "ab"))
    plan = efft.inspect(model, efft.EfftConfig(rank=2, head=[]))
    assert [(g.d_in, g.d_out, type(g.d_in), type(plan.untouched_share)) for g in plan.groups] == [(16, 48, int, float)]


def test_no_group_has_more_parameters_than_its_weights() -> None:
    def block() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(64, 1, 1), nn.Conv2d(1, 64, 1), nn.Linear(64, 64)
        )

    model = nn.Sequential(block(), block(), nn.Conv2d(64, 64, 1, groups=64))
    plan = efft.inspect(model, efft.EfftConfig(rank=32, head=[]))
    for group in plan.groups:
        weights = sum(weight.numel for weight in plan.weights_of(group).values())
        assert group.n_parameters < weights
    ranks = {(group.d_in, group.d_out): group.rank for group in plan.groups}
    assert ranks[64, 64] == (32, 32), "if the weights of a group are large, its rank must stay"
    assert ranks[9, 64][1] < 32


def test_weights_too_small_for_an_update_are_left_out_and_the_plan_says_so() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 1)})])})
    plan = efft.inspect(model, efft.EfftConfig(rank=4, head=[]))
    assert list(plan.weights) == ["layers.0.a"]
    assert "layers.*.b.weight (1, 1.5%): an update would have more parameters than the weight" in str(plan)
    everything = efft.inspect(model, efft.EfftConfig(rank=4, targets="all-linear", head=[]))
    assert list(everything.weights) == ["layers.0.a", "layers.0.b"], "'all-linear' must adapt every linear layer"


def test_modules_held_in_plain_lists_are_adapted_and_come_back() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Held(), Held()).double().eval(), torch.randn(5, 16, dtype=torch.float64)
    plain, base = copy.deepcopy(model), model(x)
    originals = [*model[0].layers, *model[0].pair["last"]]
    efft.apply(model, efft.EfftConfig(rank=2, targets="all-linear", head=[]))
    randomize(model)
    with torch.no_grad():
        for name, update in efft.adapted_layers(model).items():
            plain.get_submodule(name).weight.add_(update.delta_weight())
    assert len(efft.adapted_layers(model)) == 6
    assert (plain(x) - base).abs().max() > 1e-3
    torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(copy.deepcopy(model)(x), plain(x))
    efft.merge(model)
    torch.testing.assert_close(model(x), plain(x))
    efft.remove(model)
    assert [*model[0].layers, *model[0].pair["last"]] == originals
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("names", [("0", "1"), ("left-hand side", "left_hand side"), ("a_b", "a b")])
def test_towers_of_any_name_are_saved_and_loaded(names: tuple[str, str], tmp_path: Path) -> None:
    """Towers are parts of a model with their own lists of blocks, such as a text encoder and an image encoder.

    If two towers have equal groups, the names of groups contain the names of towers. They must be valid module names.
    """

    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential()
        for name, kind in zip(names, (nn.Sequential, Tail), strict=True):
            model.add_module(name, kind(Expert(), Expert()))
        return model.eval()

    x, model = torch.randn(4, 16), efft.apply(make(), efft.EfftConfig(rank=2, head=[]))
    assert len(model.efft) == 2
    assert all(name.isidentifier() for name in model.efft)
    randomize(model)
    efft.save_adapter(model, tmp_path)
    torch.testing.assert_close(efft.load_adapter(make(), tmp_path)(x), model(x))


def test_experts_that_a_method_cannot_adapt_are_named_with_every_keyword() -> None:
    """Users may regard experts as linear layers although they are parameters with many matrices."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'efft-kernels[hf]'")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=64, num_local_experts=4)
    for targets in ("all", "all-linear"):
        with pytest.warns(
            UserWarning, match=r"8\d\.\d% .*experts\.gate_up_proj .*the method has no update for weights of this"
        ):
            efft.apply(transformers.MixtralForCausalLM(config), LoRAConfig(rank=2, targets=targets))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            efft.apply(transformers.MixtralForCausalLM(config), efft.EfftConfig(rank=2, targets=targets))


def test_a_model_without_linear_layers_is_refused_for_that() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    with pytest.raises(ValueError, match=r"^targets='all-linear' leaves no layer\. .*Other weights present: '0', '2'"):
        efft.inspect(model, efft.EfftConfig(targets="all-linear", head=[]))
