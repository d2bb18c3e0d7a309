"""Test layers that share one weight, as in models that reuse a block: they share one update and one merge."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import efft
from efft.methods import LoRAConfig


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.own = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.own(self.shared(x).tanh())
        return y


class Again(nn.Module):
    """Apply three blocks and a head; the first and the last block share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 3)
        self.blocks[2].shared.weight = self.blocks[0].shared.weight

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return Again().double().eval()


def adapted(base: nn.Module, config: efft.EfftConfig | LoRAConfig | None = None) -> nn.Module:
    model = efft.apply(copy.deepcopy(base), config or efft.EfftConfig(rank=2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, factor in efft.named_factors(model):
            factor.copy_(torch.randn(factor.shape, generator=generator, dtype=torch.float64))
    return model


X = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("config", [efft.EfftConfig(rank=2), LoRAConfig(rank=2)], ids=["efft", "lora"])
def test_one_update_for_both(base: nn.Module, config: efft.EfftConfig | LoRAConfig, tmp_path: Path) -> None:
    model = adapted(base, config)
    layers = efft.adapted_layers(model)
    assert len(layers) == 6
    first, last = layers["blocks.0.shared"], layers["blocks.2.shared"]
    assert first.weight is last.weight
    assert torch.equal(first.delta_weight(), last.delta_weight())
    assert not torch.equal(first.delta_weight(), layers["blocks.1.shared"].delta_weight())

    dense = copy.deepcopy(base)
    with torch.no_grad():
        for name in layers.keys() - {"blocks.2.shared"}:  # this layer shares the weight of blocks.0.shared
            dense.get_submodule(name).weight += layers[name].delta_weight()
    expected = dense(X)
    torch.testing.assert_close(model(X), expected)
    model(X).sin().sum().backward()
    assert all(factor.grad.any() for _, factor in efft.named_factors(model))

    efft.save_adapter(model, tmp_path)
    torch.testing.assert_close(efft.load_adapter(copy.deepcopy(base), tmp_path)(X), expected)
    plain = copy.deepcopy(base)
    plain.load_state_dict(efft.merged_state_dict(model))
    torch.testing.assert_close(plain(X), expected)
    untied = copy.deepcopy(base)
    untied.blocks[2].shared.weight = nn.Parameter(base.blocks[2].shared.weight.detach().clone())
    with pytest.raises(ValueError, match=r"blocks\.2\.shared only in the adapter"):
        efft.load_adapter(untied, tmp_path)


def test_merged_and_back(base: nn.Module, tmp_path: Path) -> None:
    model = adapted(base)
    live, state = model(X), efft.merged_state_dict(model)
    efft.merge(model)
    torch.testing.assert_close(model(X), live)
    for name, value in efft.merged_state_dict(model, dtype=torch.float32).items():
        torch.testing.assert_close(value, state[name].float())
    efft.save_adapter(model, tmp_path)
    with efft.disabled(model):
        assert torch.equal(model(X), base(X))
    torch.testing.assert_close(model(X), live)
    torch.testing.assert_close(efft.load_adapter(copy.deepcopy(base), tmp_path)(X), live)
    efft.unmerge(model)
    assert torch.equal(model(X), live)
    efft.merge(model)
    copied = copy.deepcopy(model)
    for changed in (copied, model):
        efft.remove(changed)
        assert torch.equal(changed(X), base(X))
        assert changed.blocks[0].shared.weight is changed.blocks[2].shared.weight
        assert vars(changed.blocks[2].shared).keys() == vars(base.blocks[2].shared).keys()


def test_one_of_them_alone_merges_both(base: nn.Module) -> None:
    model = adapted(base)
    live, layers = model(X), efft.adapted_layers(model)
    for one in ("blocks.0.shared", "blocks.2.shared"):
        layers[one].merge()
        assert layers["blocks.0.shared"].merged
        assert layers["blocks.2.shared"].merged
        torch.testing.assert_close(model(X), live)
        layers["blocks.2.shared"].unmerge()
        assert torch.equal(model(X), live)


def test_named_or_excluded_together(base: nn.Module) -> None:
    pair = ["blocks.0.shared", "blocks.2.shared"]
    for targets in (pair, pair[:1], pair[1:]):
        assert list(efft.adapted_layers(adapted(base, efft.EfftConfig(rank=2, targets=targets)))) == pair
    assert not set(pair) & efft.adapted_layers(adapted(base, efft.EfftConfig(rank=2, exclude=pair[1:]))).keys()
    plan = efft.inspect(base)
    assert plan.untouched_share == 0
    assert plan.tied == {"blocks.2.shared": "blocks.0.shared"}


@pytest.mark.parametrize("other", ["head", "embedding"])
def test_weights_of_something_else_too_are_left_out(base: nn.Module, other: str) -> None:
    if other == "head":
        base.head = base.other = nn.Linear(8, 8).double()
    else:
        base.other = nn.Embedding(8, 8).double()
    base.other.weight = base.blocks[0].shared.weight
    with pytest.warns(UserWarning, match=r"shared\.weight \(2, .* tied: blocks\.0\.shared and blocks\.2\.shared and "):
        model = efft.apply(base, efft.EfftConfig(rank=2, head=["head"]))
    assert len(efft.adapted_layers(model)) == 4


def test_a_head_that_shares_a_parameter_with_the_backbone(base: nn.Module, recwarn: pytest.WarningsRecorder) -> None:
    efft.remove(efft.apply(base, efft.EfftConfig(rank=2)))
    assert not recwarn.list
    base.head.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.float64))
    base.register_parameter("table", base.head.weight)
    with pytest.warns(UserWarning, match=r"head\.weight' of the head and 'table' are one parameter"):
        efft.apply(base, efft.EfftConfig(rank=2))
