"""Test the arguments that EFFT shares with other methods of peft.

The tests check the layers that the arguments select, the resulting settings, the files, and trained biases and norms.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efft

peft = pytest.importorskip("peft", reason="needs peft: pip install 'efft-kernels[hf]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'efft-kernels[hf]'")

from efft.integrations.peft import EfftLayer, EfftPeftConfig  # noqa: E402  # it needs peft

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.arange(14).view(2, 7)


def llama() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **SIZES)).eval()
    return model


def adapted(model: nn.Module, kind: type = EfftLayer) -> set[str]:
    return {name for name, layer in model.base_model.model.named_modules() if isinstance(layer, kind)}


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS).logits
    return logits


CHOICES: dict[str, dict[str, Any]] = {
    "ends of names": {"target_modules": ["q_proj", "v_proj"]},
    "a set": {"target_modules": {"q_proj", "down_proj"}},
    "an expression": {"target_modules": r".*\.1\.(mlp\.up|self_attn\.[qk])_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "exclusion by list": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "exclusion by expression": {"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"},
    "one layer": {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": 1},
    "layers by pattern": {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    "a module that is saved whole": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_layers_are_chosen_as_by_lora(choice: str) -> None:
    lora = peft.get_peft_model(llama(), peft.LoraConfig(**CHOICES[choice]))
    model = peft.get_peft_model(llama(), EfftPeftConfig(r=2, **CHOICES[choice]))
    assert adapted(model) == adapted(lora, peft.tuners.lora.LoraLayer) != set()
    torch.testing.assert_close(output(model), output(llama()))


def test_layers_of_targets_are_narrowed_too() -> None:
    config = EfftPeftConfig(r=2, targets="mhsa", layers_to_transform=[1], exclude_modules=["o_proj"])
    model = peft.get_peft_model(llama(), config)
    assert adapted(model) == {f"model.layers.1.self_attn.{part}_proj" for part in "qkv"}
    assert adapted(peft.get_peft_model(llama(), EfftPeftConfig(r=2, exclude_modules=["mlp.gate_proj"]))) == {
        name for name, layer in llama().named_modules() if isinstance(layer, nn.Linear) and "gate" not in name
    } - {"lm_head"}


def test_names_that_end_others() -> None:
    """A regular expression must match a complete name. A list also selects layers whose names end with its entries."""

    class Net(nn.Module):
        def __init__(self, inner: bool = True) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.sub = Net(False) if inner else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.sub(self.lin(x))
            return y

    model = peft.get_peft_model(Net(), EfftPeftConfig(r=2, target_modules="lin"))
    assert adapted(model) == {"lin"}
    assert adapted(peft.get_peft_model(Net(), EfftPeftConfig(r=2, target_modules=["lin"]))) == {"lin", "sub.lin"}


def test_settings_have_both_names() -> None:
    config = EfftPeftConfig(r=8, lora_alpha=16, lora_dropout=0.05, modules_to_save=["lm_head"])
    assert (config.rank, config.scale, config.dropout, config.head) == (8, 2.0, 0.05, ["lm_head"])
    config = EfftPeftConfig(rank=4, scale=0.5, dropout=0.2, head=[])
    assert (config.r, config.lora_alpha, config.lora_dropout, config.modules_to_save) == (4, 2.0, 0.2, [])
    config.r = 2
    assert (config.rank, config.scale, config.lora_alpha) == (2, 0.5, 1.0)
    assert EfftPeftConfig(rank={"mhsa": 3, "ffn": (2, 5)}).r == 5
    assert EfftPeftConfig(scale="auto").lora_alpha is None


def test_lora_alpha_scales_the_update() -> None:
    """The update must equal (lora_alpha / r) U C V."""
    torch.manual_seed(1)
    config = EfftPeftConfig(r=4, lora_alpha=12, target_modules=["q_proj"], init_weights=False, lora_dropout=0.0)
    model = peft.get_peft_model(llama(), config)
    bank = model.base_model.efft_banks.default.mhsa
    for i in range(2):
        layer = model.base_model.model.model.layers[i].self_attn.q_proj
        expected = 12 / 4 * (bank.U.double() @ bank.C[i, 0].double() @ bank.V.double()).t()
        assert expected.norm() > 0.1
        torch.testing.assert_close(layer.get_delta_weight("default").double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 4, "rank": 8}, "rank and r name the same rank: pass only one of them, got 8 and 4"),
        (
            {"lora_alpha": 16, "scale": 2.0},
            "scale and lora_alpha name the same scale: pass only one of them, got 2.0 and 16",
        ),
        ({"lora_dropout": 0.3, "dropout": 0.2}, "dropout and lora_dropout name the same probability"),
        ({"targets": "mhsa", "target_modules": ["q_proj"]}, "targets and target_modules both choose the layers"),
        ({"r": 0}, r"Config\.rank must be an integer from 1"),
        ({"lora_alpha": "8"}, r"EfftPeftConfig\.lora_alpha must be a number, got '8'"),
        (
            {"lora_alpha": 8, "rank": (2, 4)},
            r"lora_alpha is divided by a single rank, got \(2, 4\): pass the scale itself",
        ),
        ({"bias": "lora_only"}, "bias must be 'none', 'all', 'efft_only' or 'auto', got 'lora_only'"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern must be a dict of names to ranks, got 0"),
        ({"rank_pattern": {"q_proj": 2}, "rank": (2, 3)}, r"one integer if rank_pattern is set, got \(2, 3\)"),
        ({"layers_to_transform": 0, "target_modules": "q_proj"}, "layers_to_transform narrows a list of target_mod"),
        ({"layers_to_transform": ["0"]}, r"layers_to_transform must be None, an index or a list of them, got \['0'\]"),
        (
            {"layers_pattern": "layers"},
            "layers_pattern names the list to which the indices in layers_to_transform belong",
        ),
        ({"target_modules": 3}, "target_modules must be None, a list of names, 'all-linear' or a regular expression"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EfftPeftConfig(**changes)


def test_nothing_to_adapt_is_an_error() -> None:
    expected = r"no layer of this LlamaForCausalLM is left to adapt.*target_modules=\['nothing'\], exclude_modules=None"
    with pytest.raises(ValueError, match=expected):
        peft.get_peft_model(llama(), EfftPeftConfig(target_modules=["nothing"]))
    with pytest.raises(ValueError, match=r"\['model.layers.0.self_attn.q_proj'"):
        peft.get_peft_model(llama(), EfftPeftConfig(target_modules=["q_proj"], modules_to_save=["q_proj"]))


SAVED: dict[str, dict[str, Any]] = {
    **{name: {"r": 2, **choice} for name, choice in CHOICES.items()},
    "targets": {"targets": ["q_proj", "up_proj"], "rank": {"mhsa": (2, 3), "ffn": 2}, "scale": 0.7},
    "ranks": {"r": 2, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 3}, "scale": "auto"},
    "scale found": {"r": 2, "scale": "auto", "trainable_scale": "global"},
}


@pytest.mark.parametrize("choice", SAVED)
def test_the_file_has_the_same_settings(choice: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = EfftPeftConfig(**SAVED[choice], init_weights=False)
    model = peft.get_peft_model(llama(), config).eval()
    expected = output(model)
    assert not torch.allclose(expected, output(llama()))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["target_modules"] is None) == ("target_modules" not in SAVED[choice])
    again = EfftPeftConfig.from_pretrained(tmp_path)
    by_peft = {"inference_mode": None, "auto_mapping": None}
    assert {**again.to_dict(), **by_peft} == {**config.to_dict(), **by_peft}
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert adapted(loaded) == adapted(model)
    torch.testing.assert_close(output(loaded), expected)


def test_tuples_become_lists() -> None:
    config = EfftPeftConfig(target_modules=("q_proj", "v_proj"), modules_to_save=("lm_head",))
    assert (config.target_modules, config.modules_to_save) == (["q_proj", "v_proj"], ["lm_head"])


def test_layers_of_another_rank_have_a_train_of_their_own() -> None:
    config = EfftPeftConfig(
        r=4, target_modules="all-linear", rank_pattern={"v_proj": 2, r"layers\.1\.mlp\..*": 3}, init_weights=False
    )
    model = peft.get_peft_model(llama(), config)
    banks = model.base_model.efft_banks.default
    assert {name: bank.r1 for name, bank in banks.items()} == {"mhsa": 4, "ffn": 4, "mhsa_r2": 2, "ffn_r3": 3}
    assert banks["mhsa_r2"].C.shape == (2, 1, 2, 2)
    layer = model.base_model.model.model.layers[1]
    assert torch.linalg.matrix_rank(layer.self_attn.v_proj.get_delta_weight("default"), rtol=1e-4) == 2
    assert torch.linalg.matrix_rank(layer.mlp.up_proj.get_delta_weight("default"), rtol=1e-4) == 3
    globally = EfftPeftConfig(r=4, target_modules="all-linear", rank_pattern={"v_proj": 2}, trainable_scale="global")
    trained = peft.get_peft_model(llama(), globally)
    assert sum("log_scale" in name for name, _ in trained.named_parameters()) == 1


@pytest.mark.parametrize("bias", ["none", "all", "efft_only"])
def test_biases_are_trained_and_saved(bias: str, tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)).eval()

    torch.manual_seed(1)
    config = EfftPeftConfig(r=2, target_modules=["0"], bias=bias, dropout=0.0, init_weights=False)
    model, x = peft.get_peft_model(base(), config), torch.randn(5, 4, dtype=torch.float64).float()
    inner = model.base_model.model
    trained = {"none": [], "all": [inner[0].bias, inner[2].bias], "efft_only": [inner[0].bias]}[bias]
    assert [p for p in (inner[0].bias, inner[2].bias) if p.requires_grad] == trained
    model(x).sum().backward()
    expected = base()  # the oracle is a plain model whose weight contains the update
    expected[0].weight.data += inner[0].get_delta_weight("default")
    expected(x).sum().backward()
    if trained:
        torch.testing.assert_close(inner[0].bias.grad, expected[0].bias.grad)
    for parameter in trained:
        parameter.data += 1
    with torch.no_grad():
        y = model(x)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(base(), tmp_path)(x), y)


def test_norms_are_trained_whole_a_copy_for_each_adapter(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)).eval()

    config = EfftPeftConfig(
        r=2, target_modules=["0"], bias="adapted", norms=True, dropout=0.0, init_weights=False, modules_to_save=["3"]
    )
    assert config.bias == "efft_only"
    model, x = peft.get_peft_model(base(), config), torch.randn(5, 4)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "efft_banks" not in n}
    start = "base_model.model."
    whole = {f"{start}{i}.modules_to_save.default.{name}" for i in (1, 3) for name in ("weight", "bias")}
    assert trained == {f"{start}0.base_layer.bias", *whole}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.add_(torch.randn_like(parameter))
        y = model(x)
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(base(), tmp_path)
        torch.testing.assert_close(loaded(x), y)
    plain = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="norms=True finds no normalization layer"):
        peft.get_peft_model(plain, EfftPeftConfig(r=2, target_modules=["0"], norms=True))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)).eval()


def with_biases(**fields: Any) -> nn.Module:
    """Return a model under peft, of whose trained parameters the values differ from those of the base."""
    fields = {"r": 2, "target_modules": ["0", "3"], "bias": "all", "modules_to_save": [], "dropout": 0.0, **fields}
    model: nn.Module = peft.get_peft_model(net(), EfftPeftConfig(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("fields", [{}, {"bias": "efft_only", "norms": True}], ids=str)
def test_unloading_restores_biases_and_norms(fields: dict[str, Any]) -> None:
    model, x = with_biases(**fields), torch.randn(5, 4)
    y = model(x).detach()
    torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(x), y)
    base = model.unload()
    assert base(x).equal(net()(x))
    assert all(parameter.equal(base.state_dict()[name]) for name, parameter in net().state_dict().items())


def test_a_deleted_adapter_leaves_the_biases_of_the_base() -> None:
    model, x = with_biases(), torch.randn(5, 4)
    model.delete_adapter("default")
    model.add_adapter("other", EfftPeftConfig(r=2, target_modules=["0"], modules_to_save=[]))
    model.set_adapter("other")
    torch.testing.assert_close(model(x), net()(x))


def test_biases_belong_to_one_adapter() -> None:
    """peft has one copy of every bias, so another adapter would use the biases that the first one has trained."""
    plain = EfftPeftConfig(r=2, target_modules=["0"], modules_to_save=[])
    model, x = with_biases(), torch.randn(2, 4)
    y = model(x)
    with pytest.raises(ValueError, match=r"adapter 'default' trains biases .* supports only 1 adapter with bias"):
        model.add_adapter("other", plain)
    assert model(x).equal(y)
    assert list(model.peft_config) == ["default"]
    model.delete_adapter("default")
    model.add_adapter("other", plain)
    with pytest.raises(ValueError, match="adapter 'third' trains biases"):
        model.add_adapter("third", EfftPeftConfig(r=2, target_modules=["0"], bias="auto", modules_to_save=[]))
    with pytest.raises(ValueError, match="samples of '__base__' would use them too"):
        with_biases()(x, adapter_names=["default", "__base__"])


@pytest.mark.parametrize(
    "fields",
    [{}, {"norms": True}, {"bias": "all", "norms": True}, {"bias": "none"}, {"target_modules": ["attn.qkv"]}],
    ids=str,
)
def test_a_budget_counts_what_peft_trains(fields: dict[str, Any]) -> None:
    timm = pytest.importorskip("timm", reason="needs the vision extra")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}

    def trained(config: EfftPeftConfig) -> int:
        model = peft.get_peft_model(timm.create_model("vit_tiny_patch16_224", **sizes), config)
        used = {n: p for n, p in model.named_parameters() if "original_module" not in n and p.requires_grad}
        return sum(p.numel() for n, p in used.items() if not n.startswith("base_model.model.head."))

    vit = timm.create_model("vit_tiny_patch16_224", **sizes)
    budget = trained(EfftPeftConfig(r=5, **{"bias": "auto", **fields}))
    for spare, rank in ((0, 5), (1, 5), (-1, 4)):
        config = EfftPeftConfig.auto(budget=budget + spare, model=vit, **fields)
        assert config.rank == rank
        assert trained(config) <= budget + spare
    assert EfftPeftConfig.auto(r=8, lora_dropout=0.5) == EfftPeftConfig.auto(rank=8, dropout=0.5)


@pytest.mark.parametrize("merge", [False, True])
def test_heads_of_several_layers_are_unloaded(merge: bool) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        sizes = {**SIZES, "vocab_size": 50, "num_labels": 3, "pad_token_id": 0}
        model: nn.Module = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**sizes))
        return model.eval()

    model = peft.get_peft_model(base(), EfftPeftConfig(r=2, init_weights=False)).eval()
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].dense.weight.mul_(2)
    y, head = output(model), model.base_model.model.classifier.modules_to_save["default"]
    if merge:
        torch.testing.assert_close(output(model.merge_and_unload()), y)
    else:
        expected = base()
        expected.classifier = head
        assert output(model.unload()).equal(output(expected))


def test_a_plan_of_many_layers_is_found_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """peft replaces a long list of layers by endings of their names."""
    monkeypatch.setattr(peft.tuners.tuners_utils, "MIN_TARGET_MODULES_FOR_OPTIMIZATION", 1)

    def base() -> nn.Module:
        torch.manual_seed(0)
        blocks = ({"up": nn.Linear(8, 24), "act": nn.GELU(), "down": nn.Linear(24, 8)} for _ in range(3))
        return nn.Sequential(*(nn.Sequential(OrderedDict(block)) for block in blocks)).eval()

    model = peft.get_peft_model(base(), EfftPeftConfig(r=2, scale="auto", init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] is None
    x = torch.randn(5, 8)
    assert peft.PeftModel.from_pretrained(base(), tmp_path)(x).equal(model(x))


def with_batch_norms() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6))


@pytest.mark.parametrize("fields", [{"freeze_statistics": True}, {"norms": True}, {"modules_to_save": ["1", "3"]}])
def test_statistics_are_frozen_or_saved(fields: dict[str, Any], tmp_path: Path) -> None:
    config = EfftPeftConfig(**{"r": 2, "init_weights": False, "modules_to_save": [], "dropout": 0.0, **fields})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model, x = peft.get_peft_model(with_batch_norms(), config), torch.randn(8, 4)
    modes = [m.training for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
    assert not config.freeze_statistics or not any(modes)
    model.train()
    for _ in range(3):
        model(x)
    y = model.eval()(x)
    model.save_pretrained(tmp_path)
    assert peft.PeftModel.from_pretrained(with_batch_norms(), tmp_path).eval()(x).equal(y)


def test_frozen_statistics_of_trained_norms_do_not_change() -> None:
    config = EfftPeftConfig(r=2, modules_to_save=[], norms=True, freeze_statistics=True)
    model = peft.get_peft_model(with_batch_norms(), config).train()
    model(torch.randn(8, 4))
    norm = model.base_model.model[1].modules_to_save["default"]
    assert norm.running_mean.equal(torch.zeros(6))
    assert norm.weight.requires_grad


def test_statistics_that_peft_does_not_save() -> None:
    config = EfftPeftConfig(r=2, modules_to_save=[])
    with pytest.warns(UserWarning, match="2 modules, '1' first, change their statistics in training mode"):
        peft.get_peft_model(with_batch_norms(), config)


def test_the_dtype_of_factors() -> None:
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = peft.get_peft_model(
            llama().bfloat16(), EfftPeftConfig(r=2, init_weights=False), autocast_adapter_dtype=autocast
        )
        model.add_adapter("other", EfftPeftConfig(r=2), autocast_adapter_dtype=autocast)
        assert {p.dtype for p in model.base_model.efft_banks.parameters()} == {dtype}
        assert output(model).dtype == torch.bfloat16
        assert (output(model) - output(llama().bfloat16())).abs().max() > 1e-2


def test_a_child_named_like_the_bank(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.efft_banks = nn.ModuleDict({"default": nn.Linear(4, 4), "other": nn.Linear(4, 4)})

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.efft_banks["other"](self.efft_banks["default"](x))
            return y

    torch.manual_seed(1)
    x, config = torch.randn(3, 4), {"r": 2, "target_modules": ["default"], "init_weights": False}
    model = peft.get_peft_model(Net(), EfftPeftConfig(**config, modules_to_save=["efft_banks.other"])).eval()
    y = model(x)
    assert not torch.allclose(y, Net()(x))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(Net(), tmp_path).eval()(x), y)
    torch.testing.assert_close(model.merge_and_unload()(x), y, rtol=1e-5, atol=1e-6)
    two = peft.get_peft_model(Net(), EfftPeftConfig(**config)).eval()
    two.add_adapter("second", EfftPeftConfig(**config))
    two.delete_adapter("second")
    assert peft.get_model_status(two).available_adapters == ["default"]


def test_the_same_settings_by_apply() -> None:
    """With equal settings, peft and ``efft.apply`` must train the same number of parameters."""
    config = efft.EfftConfig(rank=4, scale=2.0, dropout=0.05, targets=["q_proj", "v_proj"], head=[])
    ours = efft.count_parameters(efft.apply(llama(), config)).factors
    theirs = peft.get_peft_model(
        llama(), EfftPeftConfig(r=4, lora_alpha=8, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])
    )
    assert theirs.get_nb_trainable_parameters()[0] == ours


@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], "all-linear"])
def test_attention_that_is_not_square(modules: Any, tmp_path: Path) -> None:
    """Layers that do not fit the paper's tensor train must share another tensor train with layers of the same shape."""
    sizes = {"num_key_value_heads": 1, "head_dim": 16, **SIZES}

    def base() -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=50, **sizes)).eval()
        return model

    torch.manual_seed(1)
    model = peft.get_peft_model(base(), EfftPeftConfig(r=2, target_modules=modules, init_weights=False)).eval()
    assert adapted(model) == adapted(
        peft.get_peft_model(base(), peft.LoraConfig(target_modules=modules)), peft.tuners.lora.LoraLayer
    )
    assert (output(model) - output(base())).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(output(peft.PeftModel.from_pretrained(base(), tmp_path).eval()), output(model))
