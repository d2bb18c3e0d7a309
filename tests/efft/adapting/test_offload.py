"""Test models whose weights accelerate offloads to the CPU or the disk.

Their adapters train, save and load like those of other models. Operations that read the offloaded weights are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efft
from efft.methods import LoRAXSConfig

accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install 'efft-kernels[train]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'efft-kernels[hf]'")

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64}
IDS = torch.arange(12).view(2, 6)
CPU = torch.device("cpu")
CONFIG = {"rank": 4, "dropout": 0.0}

Offload = Callable[[], nn.Module]


def base() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2))
    return model.eval()


@pytest.fixture(params=["cpu", "disk", "device_map"])
def offloaded(request: pytest.FixtureRequest, tmp_path: Path) -> Offload:
    def to_cpu() -> nn.Module:
        return accelerate.cpu_offload(base(), execution_device=CPU)  # type: ignore[no-any-return]

    def to_disk() -> nn.Module:
        return accelerate.disk_offload(base(), tmp_path / "offloaded", execution_device=CPU)  # type: ignore[no-any-return]

    def by_map() -> nn.Module:
        base().save_pretrained(tmp_path / "base")  # type: ignore[operator]
        settings = {"device_map": "auto", "max_memory": {"cpu": "50KB"}, "offload_folder": tmp_path / "offloaded"}
        return transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", **settings).eval()  # type: ignore[no-any-return]

    return {"cpu": to_cpu, "disk": to_disk, "device_map": by_map}[request.param]


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Make all factors random, and return the loss and the gradient of each factor."""
    torch.manual_seed(1)
    for _, factor in efft.named_factors(model):
        nn.init.normal_(factor, std=0.1)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return {"loss": loss} | {name: factor.grad for name, factor in efft.named_factors(model) if factor.grad is not None}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    y: Tensor = model(IDS).logits
    return y


def weight(model: Any) -> Tensor:
    w: Tensor = model.model.layers[1].mlp.up_proj.weight
    return w


def test_trains_saves_and_loads(offloaded: Offload, tmp_path: Path) -> None:
    model, whole = offloaded(), efft.apply(base(), efft.EfftConfig(**CONFIG))
    assert weight(model).is_meta, "the weight must be offloaded before the test"
    efft.apply(model, efft.EfftConfig(**CONFIG))
    expected = trained(whole)
    for name, value in trained(model).items():
        torch.testing.assert_close(value, expected[name])
    assert weight(model).is_meta, "the weight must be offloaded again after the pass"
    efft.save_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(efft.load_adapter(base(), tmp_path / "adapter")), logits(whole))
    efft.save_adapter(whole, tmp_path / "adapter")
    again = efft.load_adapter(offloaded(), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(whole))


def test_another_base_is_noticed(offloaded: Offload, tmp_path: Path) -> None:
    other = base()
    nn.init.normal_(other.model.layers[0].mlp.up_proj.weight)  # type: ignore[union-attr,index]
    efft.save_adapter(efft.apply(other, efft.EfftConfig(**CONFIG)), tmp_path / "adapter")
    model = offloaded()
    with pytest.raises(ValueError, match="fingerprints differ"):
        efft.load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), logits(base()))


def test_removed(offloaded: Offload) -> None:
    model = efft.apply(offloaded(), efft.EfftConfig(**CONFIG))
    trained(model)
    torch.testing.assert_close(logits(efft.remove(model)), logits(base()))
    assert weight(model).is_meta
    efft.apply(model, efft.EfftConfig(**CONFIG))


def test_what_reads_the_weights_is_refused(offloaded: Offload) -> None:
    model = efft.apply(offloaded(), efft.EfftConfig(**CONFIG))
    for operation in (efft.merge, efft.merged_state_dict):
        name = operation.__name__
        with pytest.raises(ValueError, match=rf"efft.{name}: the weights of \d+ layers .*first. are offloaded"):
            operation(model)
    model = offloaded()
    with pytest.raises(ValueError, match=r"lora_xs makes its factors from the weights of .* which are offloaded"):
        efft.apply(model, LoRAXSConfig(rank=2))
    torch.testing.assert_close(logits(model), logits(base()))


def test_a_head_that_is_offloaded_is_refused() -> None:
    config = transformers.ViTConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1)
    model = accelerate.cpu_offload(transformers.ViTForImageClassification(config), execution_device=CPU)
    with pytest.raises(ValueError, match="the head 'classifier' is to be trained, but its weights are offloaded"):
        efft.apply(model, efft.EfftConfig(rank=2))
    efft.apply(model, efft.EfftConfig(rank=2, head=[]))


def test_layers_on_several_devices_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    hook = accelerate.hooks.AlignDevicesHook(execution_device="meta")
    accelerate.hooks.add_hook_to_module(model[1], hook)
    with pytest.raises(ValueError, match="one device, got '0' on cpu and '1' on meta: load the model onto one device"):
        efft.apply(model, efft.EfftConfig(targets=["0", "1"], rank=2, head=[]))
    assert "forward" in model[1].__dict__
