"""Test ``efft.export_lora``: ``peft`` without efft computes the output of the adapted model from the exported files.

Models for which peft would compute another output are refused.
"""

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
from efft_kernels import Site, TTFactors
from efft_kernels.nn.adapt import adapt

Make = Callable[..., nn.Module]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

#: A program that loads the base and the checkpoint, and uses peft without efft.
LOAD = """
import sys, torch, warnings
folder, base, inputs, out = sys.argv[1:]
import peft
torch.set_num_threads(1)
model = torch.load(base, weights_only=False).eval()
warnings.simplefilter("error", UserWarning)  # for example, peft warns about missing keys
model = peft.PeftModel.from_pretrained(model, folder).eval()
x = torch.load(inputs)
with torch.no_grad():
    y = model(x)
    y = getattr(y, "logits", y)
    merged = model.merge_and_unload()(x)
    torch.save((y, getattr(merged, "logits", merged)), out)
assert "efft" not in sys.modules and "efft_kernels" not in sys.modules
"""


def in_peft_alone(base: nn.Module, folder: Path, x: Tensor, scratch: Path) -> tuple[Tensor, Tensor]:
    """Run the checkpoint in a new process without efft; return the logits before and after a merge by peft."""
    pytest.importorskip("peft", reason="needs peft: pip install 'efft-kernels[hf]'")
    torch.save(base, scratch / "base.pt")
    torch.save(x, scratch / "x.pt")
    files = [folder, scratch / "base.pt", scratch / "x.pt", scratch / "y.pt"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", LOAD, *map(str, files)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=scratch)
    assert done.returncode == 0, done.stderr
    unmerged, merged = torch.load(scratch / "y.pt")
    return unmerged, merged


def check(model: nn.Module, base: nn.Module, x: Tensor, scratch: Path) -> None:
    with torch.no_grad():
        for name in model.efft.head:
            for parameter in model.get_submodule(name).parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        expected, plain = model(x), base(x)
    expected, plain = getattr(expected, "logits", expected), getattr(plain, "logits", plain)
    folder = efft.export_lora(model, scratch / "lora")
    unmerged, merged = in_peft_alone(base, folder, x, scratch)
    error = max((unmerged - expected).abs().max(), (merged - expected).abs().max()).item()
    print(f"largest difference of a logit: {error:.1e}; by the update: {(expected - plain).abs().max():.1e}")
    assert (expected - plain).abs().max() > 0.05, "the update is too small to compare"
    assert error <= 1e-5


@pytest.mark.parametrize(
    "config",
    [
        {"rank": {"mhsa": 3, "ffn": (2, 5)}, "scale": -1.5, "trainable_scale": "matrix"},
        {"rank": (4, 3), "variant": "efft1", "scale": 0.7, "core_sharing": "shared"},
    ],
    ids=str,
)
def test_timm_vit(config: dict[str, Any], adapted_vit: Make, tiny_vit: Make, images: Tensor, tmp_path: Path) -> None:
    """The cases cover r1 != r2, transposed updates, updates of column ranges, several ranks, and a trained scale."""
    model = adapted_vit(std=0.3, **config)
    with torch.no_grad():
        for factors in model.efft.values():
            if factors.log_scale is not None:
                factors.log_scale.normal_(std=0.5)
    check(model, tiny_vit().eval(), images, tmp_path)


def test_timm_swin(tiny_swin: Make, randomize: Make, tmp_path: Path) -> None:
    config = efft.EfftConfig(rank={"mhsa": 2, "ffn": (2, 4)})
    model = randomize(efft.apply(tiny_swin().eval(), config), std=0.4)
    check(model, tiny_swin().eval(), torch.randn(2, 3, 32, 32), tmp_path)


def test_transformers_vit(randomize: Make, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'efft-kernels[hf]'")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "image_size": 16, "patch_size": 8, "num_labels": 5}
    config = transformers.ViTConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)

    def make() -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = transformers.ViTForImageClassification(config).eval()
        return model

    model = randomize(efft.apply(make(), efft.EfftConfig(rank=(3, 4))), std=0.4)
    check(model, make(), torch.randn(2, 3, 16, 16), tmp_path)


@pytest.mark.parametrize(
    "fields",
    [{"bias": "all", "norms": True}, {"bias": "adapted", "targets": "mhsa"}, {"norms": True}, {"bias": "auto"}],
    ids=str,
)
def test_biases_and_norms(
    fields: dict[str, Any], adapted_vit: Make, tiny_vit: Make, images: Tensor, tmp_path: Path
) -> None:
    model = adapted_vit(std=0.3, **fields)
    names = set(model.efft.extras)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    check(model, tiny_vit().eval(), images, tmp_path)
    assert json.loads((tmp_path / "lora" / CONFIG).read_text())["bias"] == {
        "adapted": "lora_only",
        "auto": "lora_only",
    }.get(fields.get("bias"), fields.get("bias", "none"))


def test_biases_of_transformers(randomize: Make, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'efft-kernels[hf]'")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "image_size": 16, "patch_size": 8, "num_labels": 5}
    config = transformers.ViTConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)

    def make() -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = transformers.ViTForImageClassification(config).eval()
        return model

    model = randomize(efft.apply(make(), efft.EfftConfig(rank=3, bias="all", norms=True)), std=0.4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in model.efft.extras:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    check(model, make(), torch.randn(2, 3, 16, 16), tmp_path)


def test_biases_that_peft_does_not_know_are_refused(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_bias, self.linear = nn.Parameter(torch.zeros(8)), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x + self.q_bias)
            return y

    model = efft.apply(nn.Sequential(Block(), Block()), efft.EfftConfig(rank=2, head=[], bias="all"))
    with pytest.raises(ValueError, match=r"'0.q_bias' was trained, and peft knows only biases of the name 'bias'"):
        efft.export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


# --- files ------------------------------------------------------------------------------------------------------------


class Product(nn.Module):
    """Multiply by the module's own parameter, ``[d_out, d_in]`` or transposed."""

    def __init__(self, d_in: int, d_out: int, turned: bool) -> None:
        super().__init__()
        self.weight, self.turned = nn.Parameter(torch.randn((d_in, d_out) if turned else (d_out, d_in))), turned

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight if self.turned else self.weight.t())


class Kinds(nn.Module):
    """Hold one layer of every kind that peft also supports, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.line, self.linear = nn.Embedding(11, 8), nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8, 6)
        self.product, self.turned, self.volume = Product(6, 10, False), Product(10, 8, True), nn.Conv3d(1, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(self.line(self.words(x).transpose(1, 2)).transpose(1, 2))
        h = self.turned(self.product(h))
        return self.volume(h[:, None, None].expand(-1, 1, 2, -1, -1)).flatten(1)


def test_every_kind_of_weight(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'efft-kernels[hf]'")
    torch.manual_seed(0)
    base = Kinds().eval()
    model, x = copy.deepcopy(base), torch.randint(11, (2, 5))
    sites, views = {}, {"product.weight": "linear", "turned.weight": "transposed"}
    names = ["words", "line", "linear", "volume", *views]
    efft.apply(model, efft.EfftConfig(targets=["words", "line", "linear", "volume"], rank=3, head=[]))
    for name, (d_in, d_out) in {"product": (6, 10), "turned": (10, 8)}.items():
        sites[f"{name}.weight"] = model.efft[name] = TTFactors(d_in, d_out, 2 + (name == "turned"))
    adapt(model, {name: (bank, Site()) for name, bank in sites.items()}, views=views)
    model.efft.layers += list(sites)
    for factor in model.efft.parameters():
        nn.init.normal_(factor, std=0.3)
    assert list(efft.adapted_layers(model)) == names
    live = model.eval()(x)
    efft.export_lora(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert (live - base(x)).norm() > 0.1 * base(x).norm()
    torch.testing.assert_close(loaded(x), live, atol=1e-5, rtol=1e-4)


class Heads(nn.Module):
    """Hold a list of heads, as in CrossViT, and a layer whose name ends with the name of a head, as in VOLO."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))
        self.heads = nn.ModuleList([nn.Linear(8, 3), nn.ModuleList([nn.Linear(8, 3)])])
        self.last, self.before_last = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        y: Tensor = self.heads[0](x) + self.heads[1][0](x) + self.last(x) * self.before_last(x)
        return y


def test_heads_in_a_list_and_names_that_end_alike(randomize: Make, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'efft-kernels[hf]'")
    torch.manual_seed(0)
    base, x = Heads().eval(), torch.randn(4, 8)
    model = randomize(efft.apply(copy.deepcopy(base), efft.EfftConfig(rank=2, head=["heads", "last"])))
    for layer in (model.heads[0], model.heads[1][0], model.last):
        nn.init.normal_(layer.weight)
    efft.export_lora(model, tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]
    assert saved == ["heads.0", "heads.1.0", "last", "before_last"]
    torch.testing.assert_close(peft.PeftModel.from_pretrained(base, tmp_path)(x), model(x))


def test_weights_that_peft_would_read_without_their_update_are_refused(tmp_path: Path) -> None:
    def attention(**more: Any) -> nn.Module:
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        return efft.apply(model, efft.EfftConfig(rank=2, head=[], **more))

    for model, reason in (
        (attention(), "in_proj_weight' is a parameter of a MultiheadAttention, which peft does not wrap"),
        (attention(exclude=["in_proj_weight"]), "the module around .*out_proj' reads its weight"),
        (
            attention(exclude=["out_proj"]),
            "in_proj_weight' is a parameter of a MultiheadAttention, which peft does not wrap",
        ),
    ):
        with pytest.raises(ValueError, match=reason):
            efft.export_lora(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_contents(adapted_vit: Make, tmp_path: Path) -> None:
    model = adapted_vit(rank={"mhsa": 3, "ffn": (2, 5)}, targets="all")
    folder = efft.export_lora(model, tmp_path / "new" / "lora", base_model="some/base")
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]
    config = json.loads((folder / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert sorted(config["target_modules"]) == sorted(model.efft.layers)
    assert config["modules_to_save"] == ["head"]
    assert config["r"] == config["lora_alpha"]
    ranks = {name: config["rank_pattern"].get(name, config["r"]) for name in model.efft.layers}
    assert ranks == {n: 3 if "attn" in n else 2 if "fc1" in n else 5 for n in model.efft.layers}
    assert config["alpha_pattern"] == config["rank_pattern"]
    tensors = load_file(folder / WEIGHTS)
    name = "base_model.model.blocks.1.mlp.fc2"
    A, B = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
    assert (A.shape, B.shape) == ((5, 64), (16, 5))
    torch.testing.assert_close(B @ A, model.blocks[1].mlp.fc2.delta_weight())
    assert torch.equal(tensors["base_model.model.head.weight"], model.head.weight)
    assert len(tensors) == 2 * len(model.efft.layers) + 2


def test_merged_models_export_the_same(adapted_vit: Make, tmp_path: Path) -> None:
    model = adapted_vit().train()
    efft.export_lora(model, tmp_path / "1")
    efft.merge(model)
    efft.export_lora(model, tmp_path / "2")
    assert (tmp_path / "1" / WEIGHTS).read_bytes() == (tmp_path / "2" / WEIGHTS).read_bytes()


class Nested(nn.Module):
    """Hold layers whose names have the same ending, ``fc`` and ``enc.fc``."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 16)
        self.enc = nn.ModuleDict({"fc": nn.Linear(16, 16), "fd": nn.Linear(16, 16)})

    def forward(self, x: Tensor) -> Tensor:
        return self.enc["fd"](self.enc["fc"](self.fc(x)))


def test_ranks_of_layers_whose_names_end_alike(randomize: Make, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'efft-kernels[hf]'")
    base = Nested()
    config = efft.EfftConfig(targets=["fc", "fd"], rank={"linear_8x16": 2, "linear_16x16": 4}, head=[])
    model = randomize(efft.apply(copy.deepcopy(base).eval(), config))
    loaded = peft.PeftModel.from_pretrained(base, efft.export_lora(model, tmp_path)).eval()
    x = torch.randn(3, 8)
    torch.testing.assert_close(loaded(x), model(x))


def test_layers_that_peft_would_adapt_too_are_refused(tmp_path: Path) -> None:
    model = efft.apply(Nested(), efft.EfftConfig(targets=["fc"], exclude=["enc.fc"], rank=2, head=[]))
    with pytest.raises(ValueError, match=r"peft would adapt 'enc\.fc' too, because its name ends with 'fc';"):
        efft.export_lora(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_not_overwritten(saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"adapter of method 'EFFT', expected an empty folder or a LoRA checkpoint"):
        efft.export_lora(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    efft.export_lora(model, tmp_path / "lora")
    efft.export_lora(model, tmp_path / "lora")


def test_a_crash_leaves_whole_files(
    saved: tuple[nn.Module, Path], randomize: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = saved
    folder = efft.export_lora(model, tmp_path / "lora")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    randomize(model, seed=9)

    def failing(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="No space left"):
        efft.export_lora(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_what_peft_would_misunderstand_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not adapted: call efft\.apply"):
        efft.export_lora(nn.Linear(2, 2), tmp_path)
    model = nn.ModuleDict({"a": nn.Linear(8, 8)})
    model["b"] = model["a"]
    efft.apply(model, efft.EfftConfig(rank=2, targets=["a"]))
    with pytest.raises(ValueError, match="'a' and 'b' are one layer, and peft would adapt only the first"):
        efft.export_lora(model, tmp_path)
    model = nn.ModuleDict({"mlp_fc": nn.Linear(8, 8), "fc": nn.Linear(8, 2)})
    efft.apply(model, efft.EfftConfig(rank=2, targets=["mlp_fc"], head=["fc"]))
    with pytest.raises(ValueError, match=r"peft would not adapt 'mlp_fc', but treat it as the head 'fc'"):
        efft.export_lora(model, tmp_path)
    assert not list(tmp_path.iterdir())
