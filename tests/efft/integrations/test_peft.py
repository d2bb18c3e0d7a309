"""Test EFFT as a method of ``peft``: it has the results of ``efft.apply``, and works with the functions of peft."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import efft

peft = pytest.importorskip("peft", reason="needs peft: pip install 'efft-kernels[hf]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'efft-kernels[hf]'")
timm = pytest.importorskip("timm", reason="needs timm: pip install 'efft-kernels[vision]'")

from efft.integrations.peft import EfftLayer, EfftPeftConfig  # noqa: E402  # it needs peft

ROOT = Path(__file__).parents[3]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 5}
PIXELS = {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))}

#: For each name, the base, its inputs and the settings of the adapter.
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], dict[str, Any]]] = {
    "timm_vit": (
        lambda: timm.models.VisionTransformer(
            img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5
        ),
        {"x": PIXELS["pixel_values"]},
        {"rank": {"mhsa": 3, "ffn": (2, 5)}, "trainable_scale": "global"},
    ),
    "vit": (
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(image_size=16, patch_size=8, **SIZES)),
        PIXELS,
        {"rank": 4, "scale": 0.8},
    ),
    "bert": (
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **SIZES)),
        {"input_ids": torch.arange(14).view(2, 7)},
        {"rank": 4, "targets": ["query", "value", "output.dense"], "core_sharing": "shared"},
    ),
}


def base(name: str = "timm_vit") -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def run(model: nn.Module, name: str = "timm_vit") -> Tensor:
    with torch.no_grad():
        y = model(**MODELS[name][1])
    logits: Tensor = getattr(y, "logits", y)
    return logits


def under_peft(name: str = "timm_vit", **changes: Any) -> nn.Module:
    """Return the tiny model under peft, with factors and a head that change the output."""
    model = peft.get_peft_model(base(name), EfftPeftConfig(**{**MODELS[name][2], **changes})).eval()
    randomize(model.base_model.efft_banks, 2)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.shape[:1] == (5,):
            parameter.data.mul_(1.5)
    return model


def randomize(banks: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in banks.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 0)


def differs(a: Tensor, b: Tensor) -> bool:
    return ((a - b).abs().max() > 0.1 * b.abs().max()).item()


@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_of_apply(name: str) -> None:
    """A new adapter does not change the output. With equal factors and heads, the results equal those of efft.apply."""
    config, inputs = MODELS[name][2], MODELS[name][1]
    plain = run(base(name), name)
    fresh = peft.get_peft_model(base(name), EfftPeftConfig(**config)).eval()
    torch.testing.assert_close(run(fresh, name), plain, rtol=1e-6, atol=1e-7)

    ours, theirs = efft.apply(base(name), efft.EfftConfig(**config)), under_peft(name)
    ours.efft.load_state_dict(theirs.base_model.efft_banks.default.state_dict())
    (head,) = ours.efft.head
    ours.get_submodule(head).load_state_dict(
        theirs.base_model.model.get_submodule(head).modules_to_save.default.state_dict()
    )
    expected = run(ours, name)
    assert torch.equal(run(theirs, name), expected)
    assert differs(expected, plain)
    for model in (ours, theirs):
        y = model(**inputs)
        getattr(y, "logits", y).square().sum().backward()
    gradients = {n: p.grad for n, p in ours.efft.named_parameters()}
    for factor, parameter in theirs.base_model.efft_banks.default.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[factor], rtol=1e-6, atol=1e-8)


RELOAD = """
import sys, torch, warnings
folder, base, inputs, out = sys.argv[1:]
import peft
import efft.integrations.peft
torch.set_num_threads(1)
model = torch.load(base, weights_only=False).eval()
warnings.simplefilter("error", UserWarning)
model = peft.PeftModel.from_pretrained(model, folder).eval()
y = model(**torch.load(inputs))
torch.save(getattr(y, "logits", y).detach(), out)
"""


@pytest.mark.parametrize("name", MODELS)
def test_same_logits_in_a_new_process(name: str, tmp_path: Path) -> None:
    model = under_peft(name)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in trained), (
        "the file must hold each factor and the head once"
    )
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "EFFT"
    torch.save(base(name), tmp_path / "base.pt")
    torch.save(MODELS[name][1], tmp_path / "x.pt")
    files = [str(tmp_path), *(str(tmp_path / file) for file in ("base.pt", "x.pt", "y.pt"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    done = subprocess.run([sys.executable, "-c", RELOAD, *files], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), run(model, name))


@pytest.mark.parametrize("name", MODELS)
def test_merging_and_switching_off(name: str) -> None:
    plain, model = run(base(name), name), under_peft(name)
    expected = run(model, name)
    weights = {n: p.clone() for n, p in model.named_parameters()}
    # peft also disables a trained head, so the output equals that of the base.
    with model.disable_adapter():
        assert torch.equal(run(model, name), plain)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(run(model, name), expected, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(run(model, name), plain)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert torch.equal(run(model, name), expected)
    merged = model.merge_and_unload()
    assert type(merged) is type(base(name))
    assert list(merged.state_dict()) == list(base(name).state_dict())
    torch.testing.assert_close(run(merged, name), expected, rtol=1e-5, atol=1e-5)


def test_unloading_gives_the_base_back() -> None:
    model = under_peft(modules_to_save=[])
    assert differs(run(model), run(base()))
    assert torch.equal(run(model.unload()), run(base()))


def test_safe_merge_finds_what_is_not_finite() -> None:
    model = under_peft()
    before = {n: p.clone() for n, p in model.named_parameters()}
    factor = model.base_model.efft_banks.default.mhsa.V
    factor.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"update of adapter 'default' has NaN or infinite entries; it was not merged"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if p is not factor)


# --- several adapters -------------------------------------------------------------------------------------------------


def test_two_adapters_are_switched(tmp_path: Path) -> None:
    model = under_peft(modules_to_save=[])
    first = run(model)
    model.add_adapter("second", EfftPeftConfig(rank=2, targets="mhsa", dropout=0.5, head=[]))
    randomize(model.base_model.efft_banks["second"], 3)
    assert torch.equal(run(model), first), "adding an adapter must not change the output"
    model.set_adapter("second")
    second = run(model)
    assert differs(second, first)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"base_model.efft_banks.second.mhsa.{factor}" for factor in "UCV"
    }
    model.set_adapter("default")
    assert torch.equal(run(model), first)

    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    again.load_adapter(tmp_path / "second", "second", low_cpu_mem_usage=True)
    torch.testing.assert_close(run(again), first)
    assert not any(p.requires_grad for p in again.parameters())
    again.set_adapter("second")
    assert torch.equal(run(again), second)

    model.delete_adapter("default")
    assert torch.equal(run(model), second)
    assert list(model.base_model.efft_banks) == ["second"]


def test_two_adapters_together_add_up() -> None:
    model = under_peft(modules_to_save=[])
    model.add_adapter("second", EfftPeftConfig(rank=2, targets="mhsa", head=[]))
    randomize(model.base_model.efft_banks["second"], 3)
    model.base_model.set_adapter(["default", "second"])
    expected = base()
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, EfftLayer):
            expected.get_submodule(name).weight.data += sum(map(layer.get_delta_weight, layer.efft_factors))
    torch.testing.assert_close(run(model), run(expected), rtol=1e-5, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter()
    torch.testing.assert_close(run(model), run(expected), rtol=1e-5, atol=1e-5)


def test_heads_of_two_adapters() -> None:
    model = under_peft()
    first = run(model)
    model.add_adapter("second", EfftPeftConfig(rank=2))
    model.set_adapter("second")
    assert torch.equal(run(model), run(base())), "a new adapter must have the head of the base"
    model.set_adapter("default")
    assert torch.equal(run(model), first)


# --- training and the rest --------------------------------------------------------------------------------------------


def test_training_moves_factors_and_head(capsys: pytest.CaptureFixture[str]) -> None:
    model = peft.get_peft_model(base(), EfftPeftConfig(rank=4)).train()
    model.print_trainable_parameters()
    count = efft.count_parameters(efft.apply(base(), efft.EfftConfig(rank=4)))
    assert f"trainable params: {count.factors + count.head:,} ||" in capsys.readouterr().out
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(PIXELS["pixel_values"]), torch.tensor([0, 1, 2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_cores_are_contracted_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from efft_kernels import TTFactors

    calls = []
    compose = TTFactors.compose
    monkeypatch.setattr(TTFactors, "compose", lambda self, sites: calls.append(len(sites)) or compose(self, sites))
    model = under_peft()
    run(model)
    assert calls == [4, 4]  # one call for mhsa and one for ffn, each with two layers in each of two blocks
    model.base_model.model.blocks[0](torch.zeros(1, 5, 16))  # a block without the model: one call per layer
    assert calls == [4, 4, *[1] * 4]


def test_copies_are_independent() -> None:
    model = under_peft()
    before, copied = run(model), copy.deepcopy(model)
    assert torch.equal(run(copied), before)
    randomize(copied.base_model.efft_banks, 5)
    assert differs(run(copied), before)
    assert torch.equal(run(model), before)


def test_compiled_into_one_graph() -> None:
    model = under_peft()
    expected = run(model)
    torch.testing.assert_close(run(torch.compile(model, fullgraph=True, backend="eager")), expected)


def test_narrow_bases_have_wide_factors() -> None:
    model = peft.get_peft_model(base().bfloat16(), EfftPeftConfig(rank=4)).eval()
    assert {p.dtype for p in model.base_model.efft_banks.parameters()} == {torch.float32}
    assert model(PIXELS["pixel_values"].bfloat16()).dtype == torch.bfloat16


def test_of_a_task_of_peft() -> None:
    """peft's sequence classification adds head names that a model may not have."""
    config = EfftPeftConfig(**MODELS["bert"][2], task_type="SEQ_CLS")
    model = peft.get_peft_model(base("bert"), config)
    assert config.modules_to_save == ["classifier"]
    assert isinstance(model, peft.PeftModelForSequenceClassification)
    output = model(**MODELS["bert"][1], labels=torch.tensor([1, 3]))
    output.loss.backward()


def test_configurations() -> None:
    config = EfftPeftConfig(rank=[2, 3], head=["head"])
    assert (config.rank, config.modules_to_save, config.peft_type) == ((2, 3), ["head"], "EFFT")
    assert EfftPeftConfig(targets=["a", "b"]).target_modules == ["a", "b"]
    with pytest.raises(ValueError, match=r"Config\.rank must be an integer from 1 to"):
        EfftPeftConfig(rank=0)
    with pytest.raises(
        ValueError, match=r"head and modules_to_save name the same modules: pass only one of them, got \['a'\]"
    ):
        EfftPeftConfig(head=["a"], modules_to_save=["b"])


def test_a_configuration_that_does_not_fit_changes_nothing() -> None:
    model = under_peft()
    names, expected = list(model.state_dict()), run(model)
    with pytest.raises(ValueError, match=r"'attn\.qvk' matches no linear layer of this VisionTransformer; nearest"):
        model.add_adapter("second", EfftPeftConfig(targets=["attn.qvk"]))
    assert list(model.state_dict()) == names
    assert torch.equal(run(model), expected)
    with pytest.raises(ValueError, match="may not be named like a group of factors, 'ffn'; rename it"):
        model.add_adapter("ffn", EfftPeftConfig(targets="mhsa"))  # this name would hide tensors of the first adapter
    assert list(model.state_dict()) == names
    with pytest.raises(ValueError, match="matches no linear layer"):
        peft.get_peft_model(base(), EfftPeftConfig(targets=["attn.qvk"]))
