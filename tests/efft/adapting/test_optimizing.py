"""Test the groups of parameters for an optimizer, and the warnings about optimizers that lose steps or rates."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efft

Make = Callable[..., nn.Module]


def test_groups_of_the_optimizer(trained: Make) -> None:
    model = trained(trainable_scale=True)
    groups = {g["name"]: g for g in efft.parameter_groups(model, 1e-3)}
    assert {n: (g["lr"], g["weight_decay"]) for n, g in groups.items()} == {
        "factors": (1e-3, 1e-4),
        "head": (1e-3, 1e-4),
        "scales": (1e-2, 0.0),
        "biases": (1e-3, 0.0),
        "norms": (1e-3, 0.0),
    }
    parameters = [p for g in groups.values() for p in g["params"]]
    assert len({id(p) for p in parameters}) == len(parameters) == sum(p.requires_grad for p in model.parameters())
    assert len(groups["norms"]["params"]) == 2 * 5
    rates = {"cores": 3, "biases": 2, "norms": 0.5, "head": 4, "scales": 5}
    groups = {g["name"]: g for g in efft.parameter_groups(model, 1e-3, rates=rates)}
    assert {n: g["lr"] for n, g in groups.items()} == pytest.approx(
        {"sides": 1e-3} | {k: v * 1e-3 for k, v in rates.items()}
    )
    assert [p.dim() for p in groups["cores"]["params"]] == [4, 4]
    assert [p.dim() for p in groups["sides"]["params"]] == [2] * 4


def test_groups_of_the_optimizer_follow_the_configuration(trained: Make) -> None:
    model = trained(rates={"cores": 3, "biases": 2, "head": 4})

    def learning_rates(**arguments: Any) -> dict[str, float]:
        return {g["name"]: g["lr"] for g in efft.parameter_groups(model, 1e-3, **arguments)}

    configured = {"sides": 1e-3, "cores": 3e-3, "head": 4e-3, "biases": 2e-3, "norms": 1e-3}
    assert learning_rates() == pytest.approx(configured)
    assert learning_rates(rates={"cores": 1, "norms": 5}) == pytest.approx(
        {"factors": 1e-3, "head": 4e-3, "biases": 2e-3, "norms": 5e-3}
    )
    assert learning_rates(head_lr=0.1) == pytest.approx({**configured, "head": 0.1})


def test_groups_of_the_optimizer_under_peft(tiny_vit: Make) -> None:
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'efft-kernels[hf]'")
    from efft.integrations.peft import EfftPeftConfig

    rates = {"cores": 3, "biases": 2, "norms": 5}
    model = peft.get_peft_model(tiny_vit(), EfftPeftConfig(rank=4, bias="all", norms=True, rates=rates))
    ours = efft.apply(tiny_vit(), efft.EfftConfig(rank=4, bias="all", norms=True, rates=rates))
    groups, expected = (
        {g["name"]: (g["lr"], sum(p.numel() for p in g["params"])) for g in efft.parameter_groups(m, 1e-3)}
        for m in (model, ours)
    )
    assert groups == expected
    model = peft.get_peft_model(tiny_vit(), EfftPeftConfig(rank=4, modules_to_save=[], rates=rates))
    model.add_adapter("other", EfftPeftConfig(rank=2, modules_to_save=[]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"the active adapters \['default', 'other'\] have different rates"):
        efft.parameter_groups(model, 1e-3)


@pytest.mark.parametrize("wrap", [torch.optim.swa_utils.AveragedModel, lambda model: nn.ModuleDict({"net": model})])
def test_groups_of_a_module_around_the_model(wrap: Callable[[nn.Module], nn.Module], trained: Make) -> None:
    model = trained(rates={"cores": 3, "biases": 2}, trainable_scale=True)
    groups, expected = (
        {
            g["name"]: (g["lr"], g["weight_decay"], [p.shape for p in g["params"]])
            for g in efft.parameter_groups(m, 1e-3)
        }
        for m in (wrap(model), model)
    )
    assert groups == expected


def test_groups_of_two_models_in_a_module(trained: Make) -> None:
    models = nn.ModuleList([trained(rates={"cores": 3}), trained(rates={"cores": 3})])
    groups = {g["name"]: len(g["params"]) for g in efft.parameter_groups(models, 1e-3)}
    assert groups == {g["name"]: 2 * len(g["params"]) for g in efft.parameter_groups(models[0], 1e-3)}
    models.append(trained(rates={"cores": 2}))
    with pytest.raises(ValueError, match="the adapted models '0', '1', '2' in this ModuleList have different rates"):
        efft.parameter_groups(models, 1e-3)


def _train(model: nn.Module, images: Tensor, groups: Any = None) -> list[str]:
    """Train for two steps with an optimizer without ``groups`` by default, and return the warnings about rates."""
    optimizer = torch.optim.SGD(groups or model.parameters(), lr=1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(images).sum().backward()
            optimizer.step()
    assert all(w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught if "learning rate" in str(w.message)]


def test_an_optimizer_that_ignores_the_rates(trained: Make, images: Tensor) -> None:
    """The warning must be issued once per model, at the first step, and only if the optimizer ignores rates."""

    def message(rates: dict[str, float]) -> str:
        return (
            "this SGD has one learning rate for parameters of the adapter that should have different rates "
            f"({rates}, as multiples of lr): create it from efft.parameter_groups(model, lr), or set rates={{}} in the "
            "configuration"
        )

    by_hand = trained(rates={"cores": 3, "biases": 2})
    assert _train(by_hand, images) == [message({"cores": 3, "biases": 2})]
    assert _train(by_hand, images) == []
    by_decay = trained(rates={"biases": 2})
    small = [p for p in by_decay.parameters() if p.dim() < 2]  # contains norms and biases
    large = [p for p in by_decay.parameters() if p.dim() >= 2]
    assert _train(by_decay, images, [{"params": large}, {"params": small}]) == [message({"biases": 2})]
    for rates in ({"head": 3}, {}, {"sides": 2, "cores": 2, "biases": 2, "norms": 2}):
        assert _train(trained(rates=rates), images) == []
    choices: tuple[dict[str, Any], ...] = ({}, {"rates": {"cores": 1}})
    for arguments in choices:
        model = trained(rates={"cores": 3, "biases": 2})
        assert _train(model, images, efft.parameter_groups(model, 1e-3, **arguments)) == []
    other = trained(rates={"cores": 3, "biases": 2})
    apart = [{"params": [p]} for p in other.parameters()]
    assert _train(other, images, apart) == []
    watched = trained(rates={"cores": 3})
    assert _train(trained(), images) == [], "another model was trained"
    assert _train(watched, images) == [message({"cores": 3})]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_an_optimizer_of_a_copy_that_ignores_the_rates(
    duplicate: Callable[[nn.Module], nn.Module], trained: Make, images: Tensor
) -> None:
    model = duplicate(trained(rates={"cores": 3}))
    assert _train(model, images, efft.parameter_groups(model, 1e-3)) == []
    assert len(_train(model, images)) == 1, "an earlier optimizer that used the rates must not prevent the warning"
    assert _train(duplicate(trained()), images) == []


def test_an_optimizer_that_ignores_the_rates_under_peft(tiny_vit: Make, images: Tensor) -> None:
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'efft-kernels[hf]'")
    from efft.integrations.peft import EfftPeftConfig

    def make() -> nn.Module:
        model: nn.Module = peft.get_peft_model(tiny_vit(), EfftPeftConfig(rank=4, rates={"cores": 3}))
        return model

    assert len(_train(make(), images)) == 1
    assert len(_train(copy.deepcopy(make()), images)) == 1
    model = make()
    assert _train(model, images, efft.parameter_groups(model, 1e-3)) == []


def test_steps_that_rounding_undoes(tiny_vit: Make, images: Tensor) -> None:
    """The weights of the norms are one, where the distance between two numbers in bfloat16 is 2**-8 or 2**-7."""
    model = efft.apply(tiny_vit().bfloat16(), efft.EfftConfig(rank=4, bias="all", norms=True, dropout=0.0))
    message = "a step of the learning rate 0.0005 would not change 96 of the 160 entries of the norms, because bfloat16"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        efft.parameter_groups(model, 5e-4)
    with torch.no_grad():
        model.norm.bias.add_(1)
    with pytest.warns(UserWarning, match=message):
        groups = efft.parameter_groups(model, 5e-4)
    before = model.norm.weight.detach().clone()
    model(images.bfloat16()).float().square().sum().backward()
    torch.optim.AdamW(groups).step()
    assert model.norm.weight.grad.any()
    assert torch.equal(model.norm.weight, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rates": {"core": 3}}, "no kind of parameters is called 'core'"),
        ({"rates": {"cores": 0}}, "rates must be positive multiples of lr, got 0 for 'cores'"),
        ({"rates": {"head": 2}, "head_lr": 1e-3}, r"head_lr and rates\['head'\] both set"),
    ],
)
def test_wrong_rates(arguments: dict[str, Any], message: str, trained: Make) -> None:
    with pytest.raises(ValueError, match=message):
        efft.parameter_groups(trained(), 1e-3, **arguments)
