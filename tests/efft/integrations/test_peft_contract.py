"""Test what peft requires of every method, on several tiny models, and print a table of the results."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

peft = pytest.importorskip("peft", reason="needs peft: pip install 'efft-kernels[hf]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'efft-kernels[hf]'")
timm = pytest.importorskip("timm", reason="needs timm: pip install 'efft-kernels[vision]'")

from efft.integrations.peft import EfftLayer, EfftPeftConfig  # noqa: E402  # it needs peft

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **SIZES}
OPT = {"dropout": 0.0, "ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 32, **SIZES}
IDS = torch.arange(21).view(3, 7)
PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
T5 = {
    "dropout_rate": 0.0,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}


def of_transformers(kind: str, config: str, **settings: Any) -> nn.Module:
    model: nn.Module = getattr(transformers, kind)(getattr(transformers, config)(**settings))
    return model


def vit() -> nn.Module:
    model: nn.Module = timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5
    )
    return model


#: For each name, the base, its inputs and the settings of the adapter.
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], dict[str, Any]]] = {
    "MLP": (
        lambda: nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 10), nn.LayerNorm(10), nn.Linear(10, 4)),
        {"input": torch.randn(3, 6, generator=torch.Generator().manual_seed(1))},
        {"target_modules": ["0", "2"], "modules_to_save": ["4"]},
    ),
    "timm ViT": (vit, {"x": PIXELS}, {"targets": "all"}),
    "ViT": (
        partial(
            of_transformers,
            "ViTForImageClassification",
            "ViTConfig",
            image_size=16,
            patch_size=8,
            num_labels=5,
            **SIZES,
        ),
        {"pixel_values": PIXELS},
        {"target_modules": "all-linear"},
    ),
    "BERT": (
        partial(of_transformers, "BertForSequenceClassification", "BertConfig", vocab_size=50, **BERT),
        {"input_ids": IDS},
        {"target_modules": ["query", "value", "dense"], "exclude_modules": ["pooler.dense"], "task_type": "SEQ_CLS"},
    ),
    "LLaMA": (
        partial(of_transformers, "LlamaForCausalLM", "LlamaConfig", vocab_size=50, **SIZES),
        {"input_ids": IDS},
        {"target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"down_proj": 2}},
    ),
    "OPT": (
        partial(of_transformers, "OPTForCausalLM", "OPTConfig", vocab_size=50, **OPT),
        {"input_ids": IDS},
        {"target_modules": r".*\.layers\.\d\.self_attn\.(out|q)_proj", "trainable_scale": "group"},
    ),
    "T5": (
        partial(of_transformers, "T5ForConditionalGeneration", "T5Config", vocab_size=50, **T5),
        {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]},
        {"target_modules": ["q", "v", "wi", "wo"], "core_sharing": "shared"},
    ),
}


@dataclass
class Case:
    """Create, load and run the model ``MODELS[name]``. Its files are written to ``folder``."""

    name: str
    folder: Path

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        return MODELS[self.name][0]().eval()

    def config(self, **changes: Any) -> EfftPeftConfig:
        return EfftPeftConfig(**{"r": 3, "lora_alpha": 6, "init_weights": False, **MODELS[self.name][2], **changes})

    def adapted(self, seed: int = 1, adapter: str = "default", **changes: Any) -> nn.Module:
        torch.manual_seed(seed)
        model: nn.Module = peft.get_peft_model(self.base(), self.config(**changes), adapter_name=adapter).eval()
        return model

    def two(self) -> nn.Module:
        """Return a model with two adapters, of which the first is active."""
        model = self.adapted()
        model.add_adapter("second", self.config(r=2, lora_alpha=8))
        return model

    def loaded(self, folder: Path | str = "", **arguments: Any) -> nn.Module:
        model: nn.Module = peft.PeftModel.from_pretrained(self.base(), self.folder / folder, **arguments)
        return model

    def run(self, model: nn.Module, **arguments: Any) -> Tensor:
        with torch.no_grad():
            return self.forward(model, **arguments)

    def forward(self, model: nn.Module, **arguments: Any) -> Tensor:
        y = model(**MODELS[self.name][1], **arguments)
        logits: Tensor = getattr(y, "logits", y)
        return logits


def differ(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() > 1e-3 * b.abs().max())


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, b.abs().max().item()))


def layers(model: nn.Module) -> list[EfftLayer]:
    return [layer for layer in model.modules() if isinstance(layer, EfftLayer)]


def starts_as_the_base(case: Case) -> None:
    torch.testing.assert_close(case.run(case.adapted(init_weights=True)), case.run(case.base()))
    assert differ(case.run(case.adapted()), case.run(case.base()))


def trains_the_adapter_alone(case: Case) -> None:
    model = case.adapted().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        case.forward(model).square().sum().backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "efft_banks" in name or "modules_to_save" in name}


def saves_and_loads(case: Case) -> None:
    model = case.adapted()
    for safely in (True, False):
        model.save_pretrained(case.folder / str(safely), safe_serialization=safely)
        again = case.loaded(str(safely))
        torch.testing.assert_close(case.run(again), case.run(model))
        assert not any(p.requires_grad for p in again.parameters())
    trained = {name for name, p in case.loaded("True", is_trainable=True).named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}


def loads_without_memory_for_it(case: Case) -> None:
    model = case.adapted()
    model.save_pretrained(case.folder)
    again = case.loaded(low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in again.parameters())
    torch.testing.assert_close(case.run(again), case.run(model))


def names_tensors_without_the_adapter(case: Case) -> None:
    model = case.two()
    tensors = peft.get_peft_model_state_dict(model)
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert not [name for name in tensors if "default" in name or "second" in name]
    fresh = case.adapted(2, "other")
    result = peft.set_peft_model_state_dict(fresh, tensors, adapter_name="other")
    assert not result.unexpected_keys
    assert not [name for name in result.missing_keys if "efft_banks" in name or "modules_to_save" in name]
    torch.testing.assert_close(case.run(fresh), case.run(model))


def merges_and_unmerges(case: Case) -> None:
    model = case.adapted()
    weights, expected = {name: p.clone() for name, p in model.named_parameters()}, case.run(model)
    model.merge_adapter()
    close(case.run(model), expected)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    close(case.run(model), expected)
    model.unmerge_adapter()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.equal(case.run(model), expected)


def unloads(case: Case) -> None:
    expected, base = case.run(case.adapted()), case.base()
    merged = case.adapted().merge_and_unload(safe_merge=True)
    assert type(merged) is type(base)
    assert list(merged.state_dict()) == list(base.state_dict())
    close(case.run(merged), expected)
    plain = case.adapted(modules_to_save=[]).unload()
    assert all(torch.equal(p, plain.state_dict()[name]) for name, p in base.state_dict().items())
    again = peft.get_peft_model(plain, case.config(init_weights=True, modules_to_save=[])).eval()
    torch.testing.assert_close(case.run(again), case.run(base))


def merges_no_nan_safely(case: Case) -> None:
    model = case.adapted()
    next(p for name, p in model.named_parameters() if name.endswith(".U")).data[0, 0] = torch.nan
    weights = [layer.weight.clone() for layer in layers(model)]
    with pytest.raises(ValueError, match="The adapter default seems to be broken: the update of adapter"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers(model), weights, strict=True))


def switches_off(case: Case) -> None:
    model, plain = case.adapted(), case.run(case.base())
    expected = case.run(model)
    trained = [p.requires_grad for p in model.parameters()]
    with model.disable_adapter():
        assert torch.equal(case.run(model), plain)
        assert not any(status.enabled for status in model.get_layer_status())
    assert torch.equal(case.run(model), expected)
    assert [p.requires_grad for p in model.parameters()] == trained
    model.merge_adapter()
    with model.disable_adapter():
        close(case.run(model), plain)


def has_several_adapters(case: Case) -> None:
    model = case.two()
    first = case.run(model)
    model.set_adapter("second")
    second = case.run(model)
    assert differ(second, first)
    model.save_pretrained(case.folder)
    again = case.loaded()
    again.load_adapter(case.folder / "second", "second")
    torch.testing.assert_close(case.run(again), first)
    again.set_adapter("second")
    torch.testing.assert_close(case.run(again), second)
    model.delete_adapter("second")
    assert torch.equal(case.run(model), first)
    assert not [name for name, _ in model.named_parameters() if "second" in name]
    with pytest.raises(ValueError, match="Adapter second does not exist"):
        model.delete_adapter("second")


def keeps_alike_names_apart(case: Case) -> None:
    model = case.adapted(adapter="adapter")
    model.add_adapter("adapter_2", case.config())
    model.save_pretrained(case.folder)
    for name in ("adapter", "adapter_2"):
        model.set_adapter(name)
        torch.testing.assert_close(case.run(case.loaded(name)), case.run(model))


def adds_up(case: Case) -> None:
    alone = {"modules_to_save": [], "task_type": None}  # peft allows only one active head
    model = case.adapted(**alone)
    model.add_adapter("second", case.config(r=2, lora_alpha=8, **alone))
    model.base_model.set_adapter(["default", "second"])
    expected = case.base()
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, EfftLayer):
            expected.get_submodule(name).weight.data += sum(map(layer.get_delta_weight, layer.efft_factors))
    close(case.run(model), case.run(expected))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter()
    close(case.run(model), case.run(expected))


def has_an_adapter_per_sample(case: Case) -> None:
    model = case.two()
    names = ["second", "__base__", "default"]
    alone = {"__base__": case.run(case.base())}
    for name in ("second", "default"):
        model.set_adapter(name)
        alone[name] = case.run(model)
    close(case.run(model, adapter_names=names), torch.stack([alone[name][i] for i, name in enumerate(names)]))


def tells_its_status(case: Case) -> None:
    model = case.two()
    status = model.get_model_status()
    assert status.available_adapters == ["default", "second"]
    assert status.active_adapters == ["default"]
    assert (status.enabled, status.merged_adapters) == (True, [])
    assert status.requires_grad == {"default": True, "second": False}
    assert status.devices == {"default": ["cpu"], "second": ["cpu"]}
    assert status.peft_types == {"default": "EFFT", "second": "EFFT"}
    assert {name for name, layer in model.base_model.named_modules() if isinstance(layer, EfftLayer)} <= {
        layer.name for layer in model.get_layer_status()
    }
    model.merge_adapter()
    assert {tuple(s.merged_adapters) for s in model.get_layer_status() if s.module_type == "EfftLayer"} == {
        ("default",)
    }


def repeats_checkpointed_layers(case: Case) -> None:
    def gradients(model: nn.Module) -> list[Tensor]:
        case.forward(model.train()).square().sum().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    expected = gradients(case.adapted(lora_dropout=0.0))
    for reentrant in (False, True):
        model = case.adapted(lora_dropout=0.0)
        inner = model.base_model.model
        if hasattr(inner, "gradient_checkpointing_enable"):
            inner.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                inner.enable_input_require_grads()
        elif hasattr(inner, "set_grad_checkpointing"):
            inner.set_grad_checkpointing()
        else:  # checkpoints the complete model
            inner.forward = partial(torch.utils.checkpoint.checkpoint, inner.forward, use_reentrant=False)
        for found, wanted in zip(gradients(model), expected, strict=True):
            close(found, wanted)


def refuses_other_shapes(case: Case) -> None:
    case.adapted().save_pretrained(case.folder)
    tensors = peft.utils.load_peft_weights(case.folder, device="cpu")
    other = case.adapted(r=4, lora_alpha=8)
    with pytest.raises(RuntimeError, match=r"size mismatch for base_model\.efft_banks\.default\.\w+\.U"):
        peft.set_peft_model_state_dict(other, tensors)
    with pytest.warns(UserWarning, match="are being ignored because you passed `ignore_mismatched_sizes=True`"):
        peft.set_peft_model_state_dict(other, tensors, ignore_mismatched_sizes=True)


def becomes_lora(case: Case) -> None:
    model = case.adapted(modules_to_save=[])
    peft.save_as_lora(case.folder, model, rank=3)
    close(case.run(case.loaded()), case.run(model))


def is_copied(case: Case) -> None:
    model = case.adapted()
    expected = case.run(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(case.run(copied), expected)
        for parameter in copied.base_model.efft_banks.parameters():
            parameter.data.add_(0.1)
        assert differ(case.run(copied), expected)
    assert torch.equal(case.run(model), expected)


def runs_in_other_dtypes(case: Case) -> None:
    expected = case.run(case.adapted())
    for dtype in (torch.bfloat16, torch.float16):
        inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in MODELS[case.name][1].items()}
        for autocast in (True, False):
            torch.manual_seed(1)
            model = peft.get_peft_model(case.base().to(dtype), case.config(), autocast_adapter_dtype=autocast).eval()
            assert {p.dtype for p in model.base_model.efft_banks.parameters()} == {torch.float32 if autocast else dtype}
            with torch.no_grad():
                y = model(**inputs)
            y = getattr(y, "logits", y)
            assert y.dtype == dtype
            assert (y.float() - expected).abs().max() < 0.1 * expected.abs().max()


PROMISES: dict[str, Callable[[Case], None]] = {
    check.__name__: check
    for check in (
        *(starts_as_the_base, trains_the_adapter_alone, saves_and_loads, loads_without_memory_for_it),
        *(names_tensors_without_the_adapter, merges_and_unmerges, unloads, merges_no_nan_safely, switches_off),
        *(has_several_adapters, keeps_alike_names_apart, adds_up, has_an_adapter_per_sample, tells_its_status),
        *(repeats_checkpointed_layers, refuses_other_shapes, becomes_lora, is_copied, runs_in_other_dtypes),
    )
}


@pytest.mark.parametrize("promise", PROMISES)
@pytest.mark.parametrize("model", MODELS)
def test_promise(model: str, promise: str, tmp_path: Path, show: Callable[..., None]) -> None:
    PROMISES[promise](Case(model, tmp_path))
    show("What peft requires of a method", promise.replace("_", " "), model, "yes")
