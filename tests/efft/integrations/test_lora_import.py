"""Test ``efft.import_lora``: the model computes the same output as ``peft`` with the same LoRA checkpoint.

Other tests export and import an adapter, and damage checkpoints, which must be refused.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import efft
from efft.adapting.inject import adapted_layers
from tests.adapter_files import CONFIG, WEIGHTS

peft = pytest.importorskip("peft", reason="needs peft: pip install 'efft-kernels[hf]'")

Make = Callable[..., nn.Module]
Unchanged = Callable[[nn.Module], AbstractContextManager[None]]
PREFIX = "base_model.model."
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 5}
_generator = torch.Generator().manual_seed(1)
PIXELS, VECTORS = torch.randn(3, 3, 16, 16, generator=_generator), torch.randn(3, 8, generator=_generator)


class Nested(nn.Module):
    """Hold layers whose names have the same ending: ``fc``, ``enc.fc`` and ``enc.dec.fc``."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.enc = nn.ModuleDict({"fc": nn.Linear(8, 8), "dec": nn.ModuleDict({"fc": nn.Linear(8, 8)})})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.enc["dec"]["fc"](self.enc["fc"](self.fc(x)).relu())
        return y


def timm_vit() -> nn.Module:
    timm = pytest.importorskip("timm", reason="needs timm: pip install 'efft-kernels[vision]'")
    return timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5)


def hf_vit() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'efft-kernels[hf]'")
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=16, patch_size=8, **SIZES))


def hf_bert() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'efft-kernels[hf]'")
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **SIZES))


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2), nn.Flatten())


#: For each case, the model, its input and the settings for peft.
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, Any]]] = {
    "fused qkv, a head": (
        timm_vit,
        PIXELS,
        {"r": 4, "lora_alpha": 6, "target_modules": ["qkv", "fc2"], "modules_to_save": ["head"]},
    ),
    "scaling by the root": (timm_vit, PIXELS, {"r": 3, "use_rslora": True, "target_modules": "all-linear"}),
    "ranks and alphas by pattern": (
        hf_vit,
        PIXELS,
        {
            "r": 2,
            "target_modules": ["q_proj", "v_proj", "fc1"],
            "rank_pattern": {"layers.1.mlp.fc1": 5, r"^vit\.(layers|blocks)\.0\..*\.q_proj": 3},
            "alpha_pattern": {"v_proj": 7, r"layers\.\d\.mlp\.fc1": 1},
        },
    ),
    "names of heads that a task adds": (
        hf_bert,
        torch.arange(14).view(2, 7),
        {"r": 4, "target_modules": ["query", "value", "output.dense"], "task_type": "SEQ_CLS"},
    ),
    "convolutions": (convolutions, PIXELS, {"r": 2, "target_modules": ["0", "2"]}),
    "biases of its layers": (timm_vit, PIXELS, {"r": 4, "target_modules": ["qkv", "fc2"], "bias": "lora_only"}),
    "all biases, norms, a head": (
        timm_vit,
        PIXELS,
        {"r": 4, "target_modules": ["qkv"], "bias": "all", "modules_to_save": ["head", "norm1", "norm2"]},
    ),
    "all biases of BERT": (hf_bert, torch.arange(14).view(2, 7), {"r": 4, "target_modules": ["query"], "bias": "all"}),
    "names that end alike": (Nested, VECTORS, {"r": 2, "target_modules": r"(enc\.)?fc"}),
    "one of those that end alike": (Nested, VECTORS, {"r": 2, "target_modules": r"^fc$"}),
}


def base(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = model(x)
    logits: Tensor = getattr(y, "logits", y)
    return logits


def under_peft(case: str, **changes: Any) -> nn.Module:
    """Return the model under peft, with factors and a head that change the output."""
    make, _, settings = CASES[case]
    config = peft.LoraConfig(**{**settings, "init_lora_weights": False, **changes})
    model: nn.Module = peft.get_peft_model(base(make), config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                std = 0.3 if "lora_" in name else parameter.std().item() or 0.1
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_of_peft(case: str, tmp_path: Path, show: Callable[..., None]) -> None:
    make, x, _ = CASES[case]
    theirs = under_peft(case)
    theirs.save_pretrained(tmp_path / "lora")
    expected, plain = run(theirs, x), run(base(make), x)
    model = efft.import_lora(base(make), tmp_path / "lora")
    error, size = (run(model, x) - expected).abs().max().item(), expected.abs().max().item()
    assert (expected - plain).abs().max() > 0.05 * size, "the update is too small to compare"
    assert error <= 1e-5 * size
    show("Imported checkpoints, relative to the largest logit", f"LoRA of peft, {case}", "difference", error / size)
    again = efft.load_adapter(base(make), efft.save_adapter(model, tmp_path / "ours"))
    assert torch.equal(run(again, x), run(model, x))
    # With bias="all", peft also trains parameters that its wrappers of complete modules do not use.
    used = {n: p for n, p in theirs.named_parameters() if p.requires_grad and ".original_module." not in n}
    count = efft.count_parameters(model)
    assert count.factors + count.extras >= sum(p.numel() for p in used.values()) - count.head


def test_rank_and_scale_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    case = "fused qkv, a head"
    theirs = under_peft(case)
    theirs.save_pretrained(tmp_path)
    model = efft.import_lora(base(timm_vit), tmp_path)
    config = model.efft.config
    assert (config.rank, config.scale, config.head, config.exclude) == (4, 1.5, ["head"], [])
    count = efft.count_parameters(model)
    assert count.factors + count.head == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    layer = theirs.base_model.model.blocks[1].attn.qkv
    assert torch.equal(model.efft.qkv.A[1], layer.lora_A.default.weight.t())
    assert torch.equal(model.efft.qkv.B[1], layer.lora_B.default.weight.t())


def test_what_lower_ranks_lack_stays_zero(tmp_path: Path) -> None:
    under_peft("ranks and alphas by pattern").save_pretrained(tmp_path)
    model = efft.import_lora(base(hf_vit), tmp_path).train()
    optimizer = torch.optim.AdamW(efft.parameter_groups(model, lr=0.1))
    before = model.efft.q.A.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        model(PIXELS).logits.square().sum().backward()
        optimizer.step()
    assert [model.efft.q.A.shape[-1], model.efft.q.B.shape[1]] == [5, 5]
    assert not torch.equal(model.efft.q.A, before)
    for i, rank in enumerate((3, 2)):
        assert not model.efft.q.A[i, :, rank:].any()
        assert not model.efft.q.B[i, rank:].any()


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [4, {"mhsa": 3, "ffn": (2, 5)}], ids=str)
def test_exported_and_imported(rank: Any, adapted_vit: Make, tiny_vit: Make, images: Tensor, tmp_path: Path) -> None:
    """Factors and head are restored exactly. If all layers have the same rank, a second export has equal tensors."""
    model = adapted_vit(rank=rank)
    efft.export_lora(model, tmp_path / "1")
    again = efft.import_lora(tiny_vit().eval(), tmp_path / "1")
    assert again.efft.config.scale == 1
    for name, layer in adapted_layers(model).items():
        (D, G), (A, B) = layer.evaluated(), adapted_layers(again)[name].evaluated()
        r = D.shape[1]
        assert torch.equal(A[:, :r], D)
        assert torch.equal(B[:r], G)
        assert not A[:, r:].any()
        assert not B[r:].any()
    assert torch.equal(again.head.weight, model.head.weight)
    torch.testing.assert_close(again(images), model(images), rtol=1e-5, atol=1e-5)
    efft.export_lora(again, tmp_path / "2")
    first, second = (load_file(tmp_path / folder / WEIGHTS) for folder in ("1", "2"))
    assert first.keys() == second.keys()
    if rank == 4:
        assert all(torch.equal(first[name], second[name]) for name in first)


# --- errors -----------------------------------------------------------------------------------------------------------

Edit = Callable[[dict[str, Any]], Any]
QKV = f"{PREFIX}blocks.0.attn.qkv"

SETTINGS: dict[str, tuple[Edit, str]] = {
    "DoRA": (lambda c: c.update(use_dora=True), "beyond those of a plain LoRA.*: 'use_dora': True; let peft merge"),
    "biases": (lambda c: c.update(bias="lora_only"), f"missing tensors: .*{QKV}.base_layer.bias"),
    "biases of tomorrow": (lambda c: c.update(bias="some"), "'bias': 'some'"),
    "lora_bias": (lambda c: c.update(lora_bias=True), "'lora_bias': True"),
    "another base": (lambda c: c.update(init_lora_weights="pissa_niter_4"), "'init_lora_weights': 'pissa_niter_4'"),
    "transposed": (lambda c: c.update(fan_in_fan_out=True), "'fan_in_fan_out': True"),
    "tokens": (lambda c: c.update(trainable_token_indices=[1, 2]), r"'trainable_token_indices': \[1, 2\]"),
    "of tomorrow": (lambda c: c.update(use_something_new=3), "'use_something_new': 3"),
    "another method": (lambda c: c.update(peft_type="IA3"), "expected 'peft_type' to be 'LORA'"),
    "no rank": (lambda c: c.update(r="8"), "'r' must be an integer from 1 to 65536, got '8'"),
    "no alpha": (lambda c: c.update(lora_alpha=None), "'lora_alpha' must be a number, got None"),
    "no ranks": (lambda c: c.update(rank_pattern={"a": 0}), "'rank_pattern' must be a dict from names to numbers"),
    "no heads": (lambda c: c.update(modules_to_save="head"), "'modules_to_save' must be a list of names, got 'head'"),
    "no pattern": (lambda c: c.update(alpha_pattern={"(": 2}), r"'\(' is neither a layer name nor a regular expr"),
    "long patterns": (lambda c: c.update(alpha_pattern={"(a)" * 2000: 2}), "at most 2000 characters of regular expr"),
    "another rank": (lambda c: c.update(r=5), r"qkv.lora_A.weight: expected \[5, 16\], adapter has \[4, 16\]"),
    "no head any more": (lambda c: c.update(modules_to_save=None), f"unexpected tensors: {PREFIX}head.bias"),
}
TENSORS: dict[str, tuple[Edit, str]] = {
    "half a layer": (lambda t: t.pop(f"{QKV}.lora_B.weight"), f"missing tensors: {QKV}.lora_B.weight"),
    "half a head": (lambda t: t.pop(f"{PREFIX}head.bias"), f"missing tensors: {PREFIX}head.bias"),
    "magnitudes": (
        lambda t: t.update({f"{QKV}.lora_magnitude_vector": torch.ones(48)}),
        "unexpected tensors: .*lora_magnitude_vector",
    ),
    "embeddings": (
        lambda t: t.update({f"{PREFIX}pos_embed.lora_embedding_A": torch.ones(4, 5)}),
        "unexpected tensors: .*lora_embedding_A",
    ),
    "unknown layer": (
        lambda t: t.update({n.replace("qkv", "query"): t.pop(n) for n in list(t) if "0.attn.qkv" in n}),
        r"does not fit this VisionTransformer: targets: 'blocks\.0\.attn\.query' matches no linear layer",
    ),
    "other width": (
        lambda t: t.update({f"{QKV}.lora_A.weight": torch.ones(4, 8)}),
        r"expected \[4, 16\], adapter has \[4, 8\]",
    ),
    "more classes": (
        lambda t: t.update({f"{PREFIX}head.weight": torch.ones(7, 16)}),
        r"head.weight: expected \[5, 16\], adapter has \[7, 16\] \(create the model with the adapter's num_classes\)",
    ),
    "no number": (
        lambda t: t[f"{QKV}.lora_A.weight"].fill_(float("nan")),
        "lora_A.weight has NaN or infinite entries",
    ),
    "integers": (
        lambda t: t.update({f"{QKV}.lora_A.weight": torch.ones(4, 16, dtype=torch.int8)}),
        "lora_A.weight is torch.int8, expected floating-point numbers",
    ),
    "no layer": (
        lambda t: [t.pop(n) for n in list(t) if "lora_" in n],
        "none of its tensors is named base_model.model",
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    under_peft("fused qkv, a head").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_are_refused(case: str, folder: Path, unchanged: Unchanged) -> None:
    edit, message = SETTINGS[case]
    config = json.loads((folder / CONFIG).read_text())
    edit(config)
    (folder / CONFIG).write_text(json.dumps(config))
    model = base(timm_vit)
    with unchanged(model), pytest.raises(ValueError, match=message):
        efft.import_lora(model, folder)


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_refused(case: str, folder: Path, unchanged: Unchanged) -> None:
    edit, message = TENSORS[case]
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)
    model = base(timm_vit)
    with unchanged(model), pytest.raises(ValueError, match=message):
        efft.import_lora(model, folder)


def test_updates_beyond_all_numbers_are_refused(folder: Path, unchanged: Unchanged) -> None:
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    config["alpha_pattern"] = {"fc2": 10**6}
    (folder / CONFIG).write_text(json.dumps(config))
    tensors[f"{PREFIX}blocks.0.mlp.fc2.lora_B.weight"].fill_(1e36)
    save_file(tensors, folder / WEIGHTS)
    model = base(timm_vit)
    with unchanged(model), pytest.raises(ValueError, match=r"the update of blocks\.0\.mlp\.fc2 is too large"):
        efft.import_lora(model, folder)


def test_other_models_and_folders_are_refused(folder: Path, adapted_vit: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is adapted already"):
        efft.import_lora(adapted_vit(), folder)
    with pytest.raises(FileNotFoundError, match=r"expected adapter_config\.json and .*, found no such folder"):
        efft.import_lora(base(timm_vit), tmp_path / "nowhere")
    ours = efft.save_adapter(adapted_vit(), tmp_path / "ours")
    with pytest.raises(ValueError, match=r"expected 'peft_type' to be 'LORA' \(efft\.load_adapter reads the files"):
        efft.import_lora(base(timm_vit), ours)


def test_a_head_that_shares_its_weight_is_refused(unchanged: Unchanged, tmp_path: Path) -> None:
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(8, 4), "fc": nn.Linear(4, 4), "decoder": nn.Linear(4, 8, bias=False)}
    )
    config = peft.LoraConfig(r=2, target_modules=["fc"], modules_to_save=["decoder"])
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path)
    model["decoder"].weight = model["embedding"].weight
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"embedding\.weight' is the same parameter as one of decoder"),
    ):
        efft.import_lora(model, tmp_path)
