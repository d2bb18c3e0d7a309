"""Test what peft can do with a trained adapter.

The tests cover batches with one adapter per sample, hot-swapping (replacing the factors of a running model), conversion
to LoRA, hooks, offloading, and weighted sums of adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

peft = pytest.importorskip("peft", reason="needs peft: pip install 'efft-kernels[hf]'")
accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install 'efft-kernels[hf]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'efft-kernels[hf]'")

from peft.utils.hotswap import hotswap_adapter  # noqa: E402

from efft.integrations.peft import EfftLayer, EfftPeftConfig  # noqa: E402  # it needs peft

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.arange(42).view(6, 7)
CPU = torch.device("cpu")


def llama() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **SIZES)).eval()
    return model


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=50, num_labels=3, **SIZES)
    model: nn.Module = transformers.BertForSequenceClassification(config).eval()
    return model


def settings(**changes: Any) -> EfftPeftConfig:
    return EfftPeftConfig(**{"r": 3, "target_modules": ["q_proj", "down_proj"], "init_weights": False, **changes})


def under_peft(base: nn.Module, config: EfftPeftConfig, seed: int = 1, **names: Any) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = peft.get_peft_model(base, config, **names).eval()
    return model


def output(model: nn.Module, **arguments: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS, **arguments).logits
    return logits


def differ(*outputs: Tensor) -> bool:
    return all((a - b).abs().max() > 0.02 * a.abs().max() for i, a in enumerate(outputs) for b in outputs[:i])


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "first", "second"),
    [
        (llama, {}, {"r": 5, "target_modules": ["v_proj", "down_proj"], "lora_alpha": 10}),
        (bert, {"target_modules": ["value", "dense"], "lora_alpha": 9}, {"targets": "all", "target_modules": None}),
    ],
)
def test_an_adapter_per_sample(base: Callable[[], nn.Module], first: dict[str, Any], second: dict[str, Any]) -> None:
    """Each sample's output equals the output with only that sample's adapter, including the head."""
    model = under_peft(base(), settings(**first), adapter_name="first")
    model.add_adapter("second", settings(**second))
    for name, head in model.named_modules():
        if name.endswith("modules_to_save.second"):
            head.weight.data.mul_(-1.5)
    alone = {"__base__": output(base())}
    for name in ("first", "second"):
        model.set_adapter(name)
        alone[name] = output(model)
    assert differ(*alone.values())
    names = ["second", "__base__", "first", "first", "__base__", "second"]
    mixed = output(model, adapter_names=names)
    torch.testing.assert_close(mixed, torch.stack([alone[name][i] for i, name in enumerate(names)]))
    assert torch.equal(output(model), alone["second"]), "a mixed batch must not change the active adapter"


def test_batches_with_beams() -> None:
    """Beam search repeats every sample together with its adapter."""
    model = under_peft(llama(), settings(scale=4.0))
    search = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(input_ids=IDS[:2], **search)
    with model.disable_adapter():
        base = model.generate(input_ids=IDS[:2], **search)
    assert not torch.equal(alone, base)
    mixed = model.generate(input_ids=IDS[:2], adapter_names=["__base__", "default"], **search)
    assert torch.equal(mixed, torch.stack([base[0], alone[1]]))


def test_batches_that_are_refused() -> None:
    model = under_peft(llama(), settings())
    with pytest.raises(ValueError, match=r"Length of `adapter_names` should be the same .* got 2 and 6"):
        output(model, adapter_names=["default"] * 2)
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): other"):
        output(model, adapter_names=["other"] * 6)
    with pytest.raises(ValueError, match="when the model is in training mode"):
        output(model.train(), adapter_names=["default"] * 6)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters, please call `unmerge_adapter`"):
        output(model, adapter_names=["default"] * 6)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(output(model, adapter_names=["default"] * 6), output(llama()))


# --- hot-swapping, LoRA -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_hotswap(compiled: bool, tmp_path: Path) -> None:
    config = {"lora_alpha": 6, "trainable_scale": "group"}
    model, other = (under_peft(llama(), settings(**config), seed) for seed in (1, 2))
    other.base_model.efft_banks.default.mhsa.log_scale.data.fill_(0.5)
    other.save_pretrained(tmp_path)
    before, expected = output(model), output(other)
    assert differ(before, expected)
    run = torch.compile(model, backend="eager") if compiled else model
    torch.testing.assert_close(output(run), before)
    parameters = [p.data_ptr() for p in model.parameters()]
    hotswap_adapter(run, tmp_path, adapter_name="default")
    torch.testing.assert_close(output(run), expected)
    assert [p.data_ptr() for p in model.parameters()] == parameters


@pytest.mark.parametrize("changes", [{"lora_alpha": 7}, {"r": 2}, {"target_modules": ["q_proj"]}])
def test_hotswap_of_what_does_not_fit(changes: dict[str, Any], tmp_path: Path) -> None:
    under_peft(llama(), settings(**changes), 2).save_pretrained(tmp_path)
    model = under_peft(llama(), settings())
    before = output(model)
    with pytest.raises(ValueError, match="Configs are incompatible: for"):
        hotswap_adapter(model, tmp_path, adapter_name="default")
    assert torch.equal(output(model), before)


@pytest.mark.parametrize(
    "changes", [{}, {"targets": "all", "target_modules": None}, {"target_modules": "all-linear", "scale": "auto"}]
)
def test_as_lora(changes: dict[str, Any], tmp_path: Path) -> None:
    """With the adapter's rank, the conversion is exact, and peft loads the result as a LoRA adapter."""
    model = under_peft(llama(), settings(**changes))
    assert model.supports_lora_conversion()
    peft.save_as_lora(tmp_path, model, rank=3)
    lora = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert lora.peft_config["default"].peft_type == "LORA"
    assert differ(output(model), output(llama()))
    torch.testing.assert_close(output(lora), output(model), rtol=1e-4, atol=1e-5)


def test_the_adapter_that_becomes_lora() -> None:
    """The model has two adapters on different layers, and the second adapter is converted."""
    model = under_peft(llama(), settings())
    model.add_adapter("other", settings(target_modules=["q_proj", "o_proj"]))
    model.set_adapter("other")
    config, tensors = peft.convert_to_lora(model, rank=3, adapter_name="other")
    lora = peft.get_peft_model(llama(), config).eval()
    peft.set_peft_model_state_dict(lora, tensors)
    torch.testing.assert_close(output(lora), output(model), rtol=1e-4, atol=1e-5)


# --- hooks and offloading ---------------------------------------------------------------------------------------------


def test_hooks_of_the_layer_count() -> None:
    """Hooks of an adapted layer must run, and their changes must take effect, as on a plain layer."""
    base, seen = llama(), []
    base.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, args, y: 2 * y)
    plain = output(base)
    model, expected = under_peft(base, settings(target_modules=["down_proj"])), llama()
    for i, layer in enumerate(model.base_model.model.model.layers):
        weight = expected.model.layers[i].mlp.down_proj.weight
        weight.data.mul_(2 if i == 0 else 1).add_(layer.mlp.down_proj.get_delta_weight("default"))
    torch.testing.assert_close(output(model), output(expected))
    layer = model.base_model.model.model.layers[1].mlp.down_proj.base_layer
    handles = [
        layer.register_forward_pre_hook(lambda *_: seen.append("before")),
        layer.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    model(input_ids=IDS).logits.sum().backward()
    assert seen == ["before", "backward"]
    for handle in handles:
        handle.remove()
    with model.disable_adapter():
        assert torch.equal(output(model), plain)
    assert differ(plain, output(llama()))
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(output(model), plain)


def test_layers_without_hooks_are_one_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original layer is not called, so no memory is needed for an output without the update."""
    model = under_peft(llama(), settings())
    calls = []
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: calls.append(self) or forward(self, x))
    output(model)
    adapted = {layer.base_layer for layer in model.modules() if isinstance(layer, EfftLayer)}
    assert len(adapted) == 4
    assert calls
    assert not adapted & set(calls)


def test_a_mask_that_comes_later_is_not_merged() -> None:
    model = under_peft(llama(), settings())
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    prune.l1_unstructured(layer.base_layer, "weight", 0.5)
    with pytest.raises(TypeError, match=r"weight is computed from other tensors \(a pruning mask"):
        layer.merge()


MAP = {
    **dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu"),
    "model.layers.1": "disk",
}
OFFLOADED: dict[str, Callable[[nn.Module, Path], Any]] = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, execution_device=CPU),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, str(folder), execution_device=CPU),
    "device_map": lambda model, folder: accelerate.dispatch_model(
        model, MAP, main_device="cpu", offload_dir=str(folder), force_hooks=True
    ),
}


@pytest.mark.parametrize("how", OFFLOADED)
def test_offloaded_models(how: str, tmp_path: Path) -> None:
    """An offloaded model is adapted or loads an adapter. It must then compute, merge, unmerge and unload correctly."""
    whole = under_peft(llama(), settings())
    whole.save_pretrained(tmp_path / "adapter")
    expected = output(whole)
    for i, give in enumerate(
        (
            lambda base: peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval(),
            lambda base: under_peft(base, settings()),
        )
    ):
        base = llama()
        OFFLOADED[how](base, tmp_path / str(i))
        assert any(p.is_meta for p in base.model.layers[1].parameters())
        model = give(base)
        torch.testing.assert_close(output(model), expected)
        model.merge_adapter()
        torch.testing.assert_close(output(model), expected, rtol=1e-5, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(output(model), expected)
        torch.testing.assert_close(output(model.merge_and_unload()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload"])
def test_adapted_models_that_are_offloaded(how: str, tmp_path: Path) -> None:
    """The factors are offloaded as well, and are present in every pass."""
    model = under_peft(llama(), settings())
    expected = output(model)
    OFFLOADED[how](model, tmp_path)
    assert all(p.is_meta for p in model.base_model.efft_banks.parameters())
    for _ in range(2):
        torch.testing.assert_close(output(model), expected)


# --- weighted sums ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [False, "group", "matrix"])
def test_a_weighted_sum(scale: str | bool, tmp_path: Path) -> None:
    """The oracle adds twice the first update and minus one half of the second update to the weights of the base."""
    changes = {"trainable_scale": scale, "target_modules": ["q_proj", "o_proj", "down_proj"]}
    model = under_peft(llama(), settings(**changes))
    model.add_adapter("second", settings(r=5, lora_alpha=10, **changes))
    for name, parameter in model.base_model.efft_banks.named_parameters():
        if name.endswith("log_scale"):
            parameter.data.normal_()
    model.add_weighted_adapter(["default", "second"], [2.0, -0.5], "sum")
    model.set_adapter("sum")
    expected = llama()
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, EfftLayer):
            first, second = layer.get_delta_weight("default"), layer.get_delta_weight("second")
            expected.get_submodule(name).weight.data += 2 * first - 0.5 * second
    assert differ(output(model), output(llama()))
    torch.testing.assert_close(output(model), output(expected), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "sum").eval()
    torch.testing.assert_close(output(again), output(model))


def test_sums_that_are_refused() -> None:
    model = under_peft(llama(), settings())
    model.add_adapter("other", settings(target_modules=["v_proj"]))
    model.add_adapter("head", settings(modules_to_save=["lm_head"]))
    for names, weights, message in (
        (["default", "other"], [1.0, 1.0], "adapters 'default' and 'other' adapt different layers"),
        (["default", "head"], [1.0, 1.0], "adapter 'head' has its own modules or biases"),
        (["default", "none"], [1.0, 1.0], "Adapter none does not exist"),
        (["default"], [1.0, 1.0], "one weight per adapter, got 1 adapters, 2 weights"),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(names, weights, "sum")
    with pytest.raises(ValueError, match="combination_type must be 'cat', which is exact, got 'svd'"):
        model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="svd")
    assert set(model.peft_config) == {"default", "other", "head"}
