"""Test buffers that training changes, such as the statistics of batch norms.

An adapter saves them, ``efft.remove`` and ``efft.disabled`` restore the values of the base model, and
``freeze_statistics=True`` prevents the changes. Other buffers are not saved.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import efft
from efft.saving.io import read_description
from tests.adapter_files import edit_config

CONFIG = {"targets": ["conv1", "conv2"], "rank": 2, "head": ["fc"]}
STATISTICS = [
    f"{norm}.{kind}" for norm in ("bn1", "bn2") for kind in ("num_batches_tracked", "running_mean", "running_var")
]


class Net(nn.Module):
    """Combine convolutions, batch norms, constant and non-persistent buffers, and a head with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.fc = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2))
        self.register_buffer("table", torch.arange(2.0))
        self.register_buffer("big_table", torch.arange(10_000))
        self.register_buffer("passing", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        y: Tensor = self.fc(x.mean((2, 3)) + self.table.sum())
        return y


def base() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.bn1.running_mean.normal_()  # type: ignore[union-attr]
    return model


def train(model: nn.Module, steps: int = 5) -> nn.Module:
    optimizer = torch.optim.AdamW(efft.parameter_groups(model, lr=1e-2))
    generator = torch.Generator().manual_seed(1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(6, 3, 8, 8, generator=generator) + 1).square().sum().backward()
        optimizer.step()
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2)) + 1


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = model.eval()(x)
    return y


def test_saved_loaded_and_put_back(tmp_path: Path, x: Tensor) -> None:
    model = train(efft.apply(base(), efft.EfftConfig(**CONFIG)))
    expected = logits(model, x)
    efft.save_adapter(model, tmp_path)
    assert read_description(tmp_path)["buffers"] == STATISTICS, (
        "only the statistics must be saved, not the constant buffers"
    )
    loaded = efft.load_adapter(base(), tmp_path)
    assert torch.equal(logits(loaded, x), expected)
    for adapted in (model, loaded):
        before, after = base().state_dict(), efft.remove(adapted).state_dict()
        assert [name for name in before if not torch.equal(before[name], after[name])] == [
            name for name in before if name.startswith("fc.") and not torch.equal(before[name], after[name])
        ]


def test_what_training_leaves_alone_is_not_saved(tmp_path: Path) -> None:
    efft.save_adapter(efft.apply(base(), efft.EfftConfig(**CONFIG)), tmp_path)
    assert read_description(tmp_path)["buffers"] == []


def test_an_adapter_replaces_the_statistics_of_another(tmp_path: Path, x: Tensor) -> None:
    """Loading an adapter whose training did not change the statistics restores the statistics of the base."""
    config = efft.EfftConfig(**CONFIG)
    still = efft.apply(base(), config)
    efft.save_adapter(still, tmp_path)
    model = efft.load_adapter(train(efft.apply(base(), config)), tmp_path)
    assert torch.equal(logits(model, x), logits(still, x))


def test_files_from_before_load_as_before(tmp_path: Path, x: Tensor) -> None:
    """Old files contain neither buffers nor the setting ``freeze_statistics``."""
    still = efft.apply(base(), efft.EfftConfig(**CONFIG))
    efft.save_adapter(still, tmp_path)

    def age(description: dict) -> None:  # type: ignore[type-arg]
        del description["buffers"], description["config"]["freeze_statistics"]

    edit_config(tmp_path, age)
    assert torch.equal(logits(efft.load_adapter(base(), tmp_path), x), logits(still, x))
    trained = train(efft.apply(base(), efft.EfftConfig(**CONFIG)))
    statistics = {name: value.clone() for name, value in trained.state_dict().items() if name in STATISTICS}
    efft.load_adapter(trained, tmp_path)
    assert all(torch.equal(trained.state_dict()[name], value) for name, value in statistics.items())


def test_missing_and_foreign_buffers_are_named(tmp_path: Path) -> None:
    efft.save_adapter(train(efft.apply(base(), efft.EfftConfig(**CONFIG))), tmp_path)
    edit_config(tmp_path, lambda description: description["buffers"].remove("bn1.running_mean"))
    with pytest.raises(ValueError, match=r"unexpected tensors: bn1\.running_mean"):
        efft.load_adapter(base(), tmp_path)
    edit_config(tmp_path, lambda description: description.update(buffers=[*STATISTICS, "table"]))
    with pytest.raises(ValueError, match="missing tensors: table"):
        efft.load_adapter(base(), tmp_path)
    edit_config(tmp_path, lambda description: description.update(buffers=[3]))
    with pytest.raises(ValueError, match="'buffers' must be a list of names"):
        efft.load_adapter(base(), tmp_path)


def test_disabled_computes_as_the_base(x: Tensor) -> None:
    model = train(efft.apply(base(), efft.EfftConfig(**CONFIG)))
    trained = logits(model, x)
    reference = base()
    reference.fc.load_state_dict(model.fc.state_dict())
    with efft.disabled(model):
        assert torch.equal(logits(model, x), logits(reference, x))
        model.train().fc.eval()  # the head does not belong to the base
        model(x)  # this pass changes the statistics, and `disabled` restores them at its end
    assert torch.equal(logits(model, x), trained)


def test_disabled_between_forward_and_backward(x: Tensor) -> None:
    """The base may run as a reference model before the backward pass, without changes to tensors saved by autograd."""
    model = train(efft.apply(base(), efft.EfftConfig(**CONFIG))).eval()
    loss = model(x).square().sum()
    with torch.no_grad(), efft.disabled(model):
        model(x)
    loss.backward()


def test_frozen_statistics(tmp_path: Path, x: Tensor) -> None:
    model = efft.apply(base().train(), efft.EfftConfig(**CONFIG, freeze_statistics=True))
    assert [name for name, m in model.named_modules() if name and not m.training] == ["bn1", "bn2"]
    train(model)
    assert [name for name, m in model.named_modules() if name and not m.training] == ["bn1", "bn2"]
    before, after = base().state_dict(), model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in STATISTICS)
    assert not torch.equal(before["fc.0.running_mean"], after["fc.0.running_mean"]), "the head is trained as usual"
    efft.save_adapter(model, tmp_path)
    assert torch.equal(logits(efft.load_adapter(base(), tmp_path), x), logits(model, x))
    efft.remove(model.train())
    assert all(m.training for m in model.modules())


def test_copies_freeze_their_own_statistics() -> None:
    model = copy.deepcopy(efft.apply(base(), efft.EfftConfig(**CONFIG, freeze_statistics=True)))
    assert not model.train().bn1.training


def test_a_base_that_is_loaded_later_is_the_base(x: Tensor) -> None:
    """Base weights that are loaded after ``apply`` count as the base. Those of an adapted model's checkpoint do not."""
    model = efft.apply(Net(), efft.EfftConfig(**CONFIG))
    names = ["conv1", "conv2", "bn1", "bn2", "fc"]
    weights = {n: t for n, t in base().state_dict().items() if n.partition(".")[0] in names}
    model.load_state_dict(weights, strict=False)
    checkpoint = copy.deepcopy(train(model).state_dict())
    resumed = efft.apply(base(), efft.EfftConfig(**CONFIG))
    resumed.load_state_dict(checkpoint)
    for adapted in (model, resumed):
        state = efft.remove(adapted).state_dict()
        assert all(torch.equal(state[name], value) for name, value in weights.items() if not name.startswith("fc."))


def test_merged_and_exported(tmp_path: Path, x: Tensor) -> None:
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'efft-kernels[hf]'")
    model = train(efft.apply(base(), efft.EfftConfig(**CONFIG)))
    expected = logits(model, x)
    merged = base()
    merged.load_state_dict(efft.merged_state_dict(model))
    torch.testing.assert_close(logits(merged, x), expected, rtol=1e-4, atol=1e-4)
    efft.export_lora(model, tmp_path)
    torch.testing.assert_close(
        logits(peft.PeftModel.from_pretrained(base(), str(tmp_path)), x), expected, rtol=1e-4, atol=1e-4
    )


def test_pools_refuse_statistics(tmp_path: Path, tiny_vit: Callable[..., nn.Module]) -> None:
    def normed() -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(3), tiny_vit())

    model = efft.apply(normed(), efft.EfftConfig(rank=2))
    model.train()(torch.randn(2, 3, 16, 16))
    efft.save_adapter(model, tmp_path)
    pool = efft.AdapterPool(normed())
    before = {name: value.clone() for name, value in pool.model.state_dict().items()}
    message = (
        "comes with buffers that its training changed .3, for example '0.num_batches_tracked'.*freeze_statistics=True"
    )
    with pytest.raises(ValueError, match=message):
        pool.load("a", tmp_path)
    with pytest.raises(ValueError, match=message):
        pool.add("a", model)
    assert all(torch.equal(value, before[name]) for name, value in pool.model.state_dict().items())
