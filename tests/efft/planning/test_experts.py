"""Test tiny mixtures of experts of transformers.

The oracle is a plain model whose weights include the dense updates.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efft
from efft.adapting.experts import AdaptedExperts, adapt_experts, experts_of, intercept
from efft_kernels import ExpertWeight, Site, TTFactors
from efft_kernels.nn.adapt import adapt, cannot_adapt, named_adapted_weights, restore
from efft_kernels.nn.parameter import restore_module
from tests.adapted_experts import AdaptedModel

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'efft-kernels[hf]'")

SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
#: The class of each model (without "ForCausalLM"), and its configuration.
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {"intermediate_size": 48, "num_local_experts": 4},
    "Qwen3Moe": {"moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 3, "head_dim": 8},
    "Olmoe": {"intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoe": {"intermediate_size": 48, "num_local_experts": 4},
    "DeepseekV3": {
        **{"moe_intermediate_size": 16, "intermediate_size": 48, "n_routed_experts": 8, "num_experts_per_tok": 2},
        **{"n_group": 2, "topk_group": 1, "first_k_dense_replace": 0, "num_key_value_heads": 4},
        **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    },
    "GptOss": {"intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]


def make_model(name: str) -> nn.Module:
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**SIZES | MODELS[name])
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():  # the initial weights are so small that most updates would dominate them
        if parameter.dim() == 3:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(SIZES["vocab_size"], (2, 7), generator=torch.Generator().manual_seed(0))
    result: Tensor = model(input_ids=ids).logits
    return result


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_model_computes_with_its_updates(name: str, implementation: str) -> None:
    """With every implementation of experts, unmerged and merged models must agree with the oracle."""
    model, plain = make_model(name), make_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for each in (model, plain):
        each.set_experts_implementation(implementation)
    base = logits(plain)
    adapted = AdaptedModel(model)
    assert len(adapted.weights) == 4
    assert set(adapted.weights) <= set(dict(model.named_parameters())), (
        "the updates must have the full names of their parameters"
    )
    live = logits(model)
    with torch.no_grad():
        for key, value in adapted.effective().items():
            plain.get_parameter(key).copy_(value)
    exact = logits(plain)
    assert (exact - base).norm() > 0.1 * base.norm(), "the update is too small to compare"
    close = {"atol": 2e-5 * exact.abs().max().item(), "rtol": 1e-4}
    torch.testing.assert_close(live, exact, **close)
    for weight in adapted.weights.values():
        weight.merge()
    torch.testing.assert_close(logits(model), exact, **close)
    for weight in adapted.weights.values():
        weight.unmerge()
        weight.enabled = False
    assert torch.equal(logits(model), base), "a disabled update must have no effect at all"
    for module in adapted.modules.values():
        restore_module(module)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(logits(model), base)
    assert not any(isinstance(m, AdaptedExperts) for m in model.modules())


def test_the_first_step_is_a_no_op(name: str) -> None:
    model = make_model(name)
    base = logits(model)
    adapted = AdaptedModel(model, std=0)
    assert not adapted.bank.V.any()
    torch.testing.assert_close(logits(model), base, atol=1e-6, rtol=1e-5)
    logits(model).square().sum().backward()
    assert adapted.bank.V.grad.any(), "V must have a gradient"


def test_training_with_checkpoints_and_dropout(name: str) -> None:
    """Activation checkpointing must not change the gradients, although it runs the blocks a second time."""
    gradients = []
    for again in (False, True):
        model = make_model(name).train()
        adapted = AdaptedModel(model, dropout=0.2)
        adapted.bank.train()
        if again:
            model.activation_checkpointing_enable()
        torch.manual_seed(11)
        adapted.bank.prepare()
        loss = logits(model).square().mean()
        adapted.bank.release()
        gradients.append(torch.autograd.grad(loss, list(adapted.bank.parameters())))
    for once, twice in zip(*gradients, strict=True):
        torch.testing.assert_close(once, twice)


def test_products_that_are_called() -> None:
    """JetMoE calls a module for each product, with tokens sorted by expert and the number of tokens of each expert."""
    config = transformers.JetMoeConfig(
        **SIZES | {"intermediate_size": 48, "num_local_experts": 4, "kv_channels": 8}, num_experts_per_tok=2
    )
    torch.manual_seed(3)
    model = transformers.JetMoeForCausalLM(config).eval()
    plain = copy.deepcopy(model)
    found = {name: m for name, m in model.named_modules() if experts_of(m) is not None}
    assert len(found) == 8
    weights: dict[str, ExpertWeight] = {}
    for name, module in found.items():
        (parameter,) = experts_of(module).parameters
        bank = TTFactors(parameter.d_in, parameter.d_out, 3, n_cores=4)
        for factor in bank.parameters():
            nn.init.normal_(factor, std=0.2)
        weights[f"{name}.weight"] = adapt_experts(module, {"weight": (bank, Site(0, (0, 1, 2, 3), experts=4))})[
            "weight"
        ]
    live = logits(model)
    with torch.no_grad():
        for name, weight in weights.items():
            plain.get_parameter(name).add_(weight.delta_weight())
    torch.testing.assert_close(live, logits(plain), atol=1e-4, rtol=1e-4)
    live.square().sum().backward()
    assert all(weight.factors.C.grad.any() for weight in weights.values())
    for weight in weights.values():
        weight.merge()
    assert torch.equal(logits(model), logits(plain))


def test_by_the_names_of_parameters(name: str) -> None:
    """``efft.apply`` also calls ``adapt`` with the names of expert parameters and of other layers."""
    model = make_model(name)
    base = logits(model)
    sites: dict[str, Any] = {}
    views: dict[str, str] = {}
    for path, module in model.named_modules():
        found = experts_of(module)
        for p in found.parameters if found is not None else ():
            cores = tuple(range(found.n_experts * p.blocks))
            bank = TTFactors(p.d_in, p.d_out // p.blocks, 3, n_cores=len(cores), init="u")
            nn.init.normal_(bank.U, std=0.3)
            site = Site(0, cores, experts=found.n_experts, interleaved=p.interleaved)
            sites[f"{path}.{p.name}"], views[f"{path}.{p.name}"] = (bank, site), p.view
            assert intercept(module)
    query = next(n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith(("q_proj", "q_a_proj")))
    layer = model.get_submodule(query)
    sites[query] = TTFactors(layer.in_features, layer.out_features, 2), Site()
    assert all(cannot_adapt(model, n, views.get(n, "linear")) is None for n in sites)
    weights = adapt(model, sites, views=views)
    assert dict(named_adapted_weights(model)) == weights
    live = logits(model)
    assert not any(weight.binding.read for weight in weights.values()), "a pass must not compute a dense weight"
    for weight in weights.values():
        assert weight.weight.shape == weight.delta_weight().shape
        weight.merge()
    merged = logits(model)
    assert (merged - base).norm() > 0.1 * base.norm()
    torch.testing.assert_close(live, merged, atol=2e-5 * base.abs().max().item(), rtol=1e-4)
    restore(model, {weights[query]: layer})
    assert torch.equal(logits(model), base)


def test_as_lora_of_peft(name: str, tmp_path: Path) -> None:
    """A LoRA checkpoint can hold the updates of experts and routers, which peft also regards as parameters."""
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'efft-kernels[hf]'")
    model, base = make_model(name), make_model(name)
    shared = [r".*shared_experts.*"] if name == "DeepseekV3" else []
    efft.apply(model, efft.EfftConfig(rank=(3, 4), exclude=shared, head=[])).eval()
    for _, factor in efft.named_factors(model):
        nn.init.normal_(factor, std=0.1)
    assert sum("experts" in n for n in efft.adapted_layers(model)) == 4
    live = logits(model)
    efft.export_lora(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # for example, peft warns about missing keys
        loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert (logits(make_model(name)) - live).norm() > 0.1 * live.norm()
    torch.testing.assert_close(logits(loaded), live, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), live, atol=1e-5, rtol=1e-4)


def test_what_peft_takes_for_experts_is_refused(tmp_path: Path) -> None:
    model = efft.apply(make_model("DeepseekV3"), efft.EfftConfig(rank=2, head=[]))
    with pytest.raises(ValueError, match=r"peft would not adapt .*shared_experts.* as a part of .*mlp\.experts"):
        efft.export_lora(model, tmp_path)


def test_all_of_a_model(name: str, tmp_path: Path) -> None:
    """One call adapts all layers without a warning. The adapter can be saved, loaded, merged and removed."""
    model, base = make_model(name), make_model(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        efft.apply(model, efft.EfftConfig(rank=3, head=[])).eval()
    matrices = {n for n, p in base.named_parameters() if p.dim() == 3}
    assert {n for n in efft.adapted_layers(model) if n.endswith(("gate_up_proj", "down_proj"))} >= matrices
    assert not any("bias" in n for n in efft.adapted_layers(model))
    assert not any(update.binding.dense for update in efft.adapted_layers(model).values())
    torch.testing.assert_close(logits(model), logits(base), atol=1e-6, rtol=1e-5)
    for _, factor in efft.named_factors(model):
        nn.init.normal_(factor, std=0.1)
    live = logits(model)
    efft.save_adapter(model, tmp_path)
    assert torch.equal(logits(efft.load_adapter(make_model(name), tmp_path).eval()), live)
    plain = make_model(name)
    plain.load_state_dict(efft.merged_state_dict(model))
    torch.testing.assert_close(logits(plain), live, atol=1e-5, rtol=1e-4)
    assert torch.equal(logits(efft.remove(model)), logits(base))
