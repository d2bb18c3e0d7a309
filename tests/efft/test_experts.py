"""Mixtures of experts of transformers with updates, each tiny and random, against dense effective weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efft.integrations.experts import AdaptedExperts, adapt_experts, experts_of, restore_experts
from efft_kernels import ExpertWeight, Site, TTFactors

transformers = pytest.importorskip("transformers", reason="needs the hf extra")

SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
#: Class of the model without ForCausalLM, and its configuration.
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
    for parameter in model.parameters():  # of the library's own weights most updates would be a multiple
        if parameter.dim() == 3:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


class Adapted:
    """A model whose experts all share one train, by hand; ``dense`` has what each update should be."""

    def __init__(self, model: nn.Module, std: float = 0.3, **kwargs: Any) -> None:
        self.model = model
        self.modules = {name: m for name, m in model.named_modules() if experts_of(m) is not None}
        first = next(iter(self.modules.values()))
        found = experts_of(first)
        up = found.parameters[0]
        n, dtype = found.n_experts, next(first.parameters()).dtype
        kwargs = {"rank": (3, 4), "scale": 0.7, "dtype": dtype, **kwargs}
        n_cores = n * sum(p.blocks for p in found.parameters)
        self.bank = TTFactors(up.d_in, up.d_out // up.blocks, n_layers=len(self.modules), n_cores=n_cores, **kwargs)
        if std:
            for factor in self.bank.parameters():
                nn.init.normal_(factor, std=std)
        self.weights: dict[str, ExpertWeight] = {}
        for layer, (name, module) in enumerate(self.modules.items()):
            taken, sites = 0, {}
            for p in experts_of(module).parameters:
                cores = tuple(range(taken, taken + n * p.blocks))
                taken += len(cores)
                site = Site(layer, cores, p.second, mask_scope=int(p.second), experts=n, interleaved=p.interleaved)
                sites[p.name] = (self.bank, site)
            weights = adapt_experts(module, sites)
            self.weights |= {f"{name}.{parameter}".lstrip("."): w for parameter, w in weights.items()}

    def dense(self, weight: ExpertWeight) -> Tensor:
        """The update by the definition, laid out like the parameter; differentiable."""
        bank, site = self.bank, weight.site
        blocks = bank.initial_scale * (bank.U @ bank.C[site.layer, list(site.cores)] @ bank.V)
        blocks = (blocks.transpose(1, 2) if site.transpose else blocks).unflatten(0, (site.experts, -1))
        matrices = blocks.movedim(1, -1 if site.interleaved else -2).flatten(-2)  # [experts, d_in, d_out]
        return matrices if weight.transposed else matrices.transpose(1, 2)

    def effective(self) -> dict[str, Tensor]:
        """Weights with their updates by name, differentiable."""
        return {name: weight.weight.detach() + self.dense(weight) for name, weight in self.weights.items()}


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(SIZES["vocab_size"], (2, 7), generator=torch.Generator().manual_seed(0))
    result: Tensor = model(input_ids=ids).logits
    return result


# Whole models


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_model_computes_with_its_updates(name: str, implementation: str) -> None:
    """Whichever implementation is chosen: live, merged and the plain model with dense effective weights agree."""
    model, plain = make_model(name), make_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for each in (model, plain):
        each.set_experts_implementation(implementation)
    base = logits(plain)
    adapted = Adapted(model)
    assert len(adapted.weights) == 4
    assert set(adapted.weights) <= set(dict(model.named_parameters())), "known by the full names of the parameters"
    live = logits(model)
    with torch.no_grad():
        for key, value in adapted.effective().items():
            plain.get_parameter(key).copy_(value)
    exact = logits(plain)
    assert (exact - base).norm() > 0.1 * base.norm(), "the update hardly counts"
    close = {"atol": 2e-5 * exact.abs().max().item(), "rtol": 1e-4}
    torch.testing.assert_close(live, exact, **close)
    for weight in adapted.weights.values():
        weight.merge()
    torch.testing.assert_close(logits(model), exact, **close)
    for weight in adapted.weights.values():
        weight.unmerge()
        weight.enabled = False
    assert torch.equal(logits(model), base), "without the update it is the chosen implementation, bit for bit"
    for module in adapted.modules.values():
        restore_experts(module)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(logits(model), base)
    assert not any(isinstance(m, AdaptedExperts) for m in model.modules())


def test_the_first_step_is_a_no_op(name: str) -> None:
    model = make_model(name)
    base = logits(model)
    adapted = Adapted(model, std=0)
    assert not adapted.bank.V.any()
    torch.testing.assert_close(logits(model), base, atol=1e-6, rtol=1e-5)
    logits(model).square().sum().backward()
    assert adapted.bank.V.grad.any(), "and the second one is not"


def test_training_with_checkpoints_and_dropout(name: str) -> None:
    """Gradients of a pass that runs its blocks again in backward are those of one that keeps everything."""
    gradients = []
    for again in (False, True):
        model = make_model(name).train()
        adapted = Adapted(model, dropout=0.2)
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


# Modules


def modules() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Experts of several classes in fp64: with biases, interleaved, transposed, without a gate, with a norm behind."""
    from transformers.models.aria.modeling_aria import AriaExperts
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    every = {
        **{"hidden_size": 8, "intermediate_size": 12, "moe_intermediate_size": 12, "moe_hidden_size": 8},
        **{"num_local_experts": 5, "n_routed_experts": 5, "moe_num_experts": 5, "mlp_hidden_act": "relu2"},
        **{"hidden_act": "silu", "swiglu_limit": 7.0, "swiglu_alpha": 1.7, "post_norm_eps": 1e-6},
        "moe_latent_size": None,
    }
    for kind in (MixtralExperts, GptOssExperts, AriaExperts, NemotronHExperts, MuseSparkExperts, DeepseekV4Experts):

        def make(kind: Any = kind) -> nn.Module:
            torch.manual_seed(5)
            config = transformers.PretrainedConfig()
            config.__dict__.update(every)
            config._experts_implementation = "eager"
            module: nn.Module = kind(config).double()
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.4)
            return module

        yield kind.__name__, make


MODULES = dict(modules())
CHOICES = {
    "some without a token": [[0, 2], [2, 3], [2, 0], [3, 2]],
    "one token for one": [[1, 4], [4, 1], [4, 3]],
    "one token": [[3, 0]],
    "no token": [],
}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("choice", CHOICES)
def test_a_module_and_its_gradients(kind: str, choice: str) -> None:
    """In fp64, against autograd through the weights plus their dense updates in the class's own forward."""
    plain, module = MODULES[kind](), MODULES[kind]()
    adapted = Adapted(module)
    chosen = torch.tensor(CHOICES[choice], dtype=torch.long).view(-1, 2)
    x = torch.randn(len(chosen), 8, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(chosen.shape, dtype=torch.float64, requires_grad=True)
    y = module(x, chosen, weights)
    exact = torch.func.functional_call(plain, adapted.effective(), (x, chosen, weights))
    exact = exact + 0 * x * weights.sum()  # a graph where the class's own has none, without a token
    close = {"atol": 1e-5, "rtol": 1e-5} if kind == "MuseSparkExperts" else {}  # its norm computes in fp32
    torch.testing.assert_close(y, exact, **close)
    wanted = [x, weights, *adapted.bank.parameters()]
    gy = torch.randn_like(y)
    got = torch.autograd.grad(y, wanted, gy, allow_unused=True, materialize_grads=True)
    right = torch.autograd.grad(exact, wanted, gy, allow_unused=True, materialize_grads=True)
    for one, two in zip(got, right, strict=True):
        torch.testing.assert_close(one, two, **close)


@pytest.mark.parametrize("kind", MODULES)
def test_one_update_of_two(kind: str) -> None:
    """One parameter merged or switched off, the other live."""
    module = MODULES[kind]()
    adapted = Adapted(module)
    chosen, x = torch.tensor(CHOICES["some without a token"]), torch.randn(4, 8, dtype=torch.float64)
    weights = torch.rand(chosen.shape, dtype=torch.float64)
    y = module(x, chosen, weights)
    first, second = adapted.weights.values()
    first.merge()
    torch.testing.assert_close(module(x, chosen, weights), y, atol=1e-5, rtol=1e-5)
    second.enabled = False
    only_first = module(x, chosen, weights)
    first.unmerge()
    torch.testing.assert_close(module(x, chosen, weights), only_first, atol=1e-5, rtol=1e-5)
    first.enabled = False
    assert torch.equal(module(x, chosen, weights), MODULES[kind]()(x, chosen, weights))


def test_copies_of_an_adapted_module() -> None:
    model = nn.ModuleDict({"experts": MODULES["GptOssExperts"]()})
    adapted = Adapted(model)
    model["bank"] = adapted.bank
    chosen, x = torch.tensor(CHOICES["one token for one"]), torch.randn(3, 8, dtype=torch.float64)
    weights = torch.rand(chosen.shape, dtype=torch.float64)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        experts = copied["experts"]
        assert type(experts) is type(model["experts"])
        assert torch.equal(experts(x, chosen, weights), model["experts"](x, chosen, weights))
        for weight in experts.efft_weights.values():
            assert weight.factors is copied["bank"]
        restore_experts(experts)
        assert type(experts) is type(MODULES["GptOssExperts"]())
        assert isinstance(model["experts"], AdaptedExperts)
    assert "GptOssExperts" in repr(model)
    assert "gate_up_proj, rank=(3, 4), layer=0, experts=5" in repr(model)


@pytest.mark.parametrize("kind", MODULES)
def test_a_compiled_graph_without_breaks(kind: str) -> None:
    module = MODULES[kind]().float()
    adapted = Adapted(module)
    chosen, x = torch.tensor(CHOICES["one token for one"]), torch.randn(3, 8)
    weights = torch.rand(chosen.shape)
    y = module(x, chosen, weights)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(x, chosen, weights)
    torch.testing.assert_close(compiled, y)
    for one, two in zip(
        *(torch.autograd.grad(out.sin().sum(), list(adapted.bank.parameters())) for out in (compiled, y)), strict=True
    ):
        torch.testing.assert_close(one, two)


def test_products_that_are_called() -> None:
    """JetMoE's, which get rows sorted by expert and how many each has."""
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


# What is recognized


@pytest.mark.parametrize("kind", MODULES)
def test_the_description_of_experts(kind: str) -> None:
    found = experts_of(MODULES[kind]())
    assert found.n_experts == 5
    up, down = found.parameters
    assert (up.d_in, up.d_out // up.blocks, down.d_in, down.d_out) == (8, 12, 12, 8)
    assert up.name == ("up_proj" if kind == "NemotronHExperts" else "gate_up_proj")
    assert up.blocks == 1 + (kind != "NemotronHExperts")
    assert up.interleaved == (kind == "GptOssExperts")
    assert up.transposed == down.transposed == (kind in ("GptOssExperts", "AriaExperts"))
    assert (down.name, down.blocks, down.second, up.second) == ("down_proj", 1, True, False)


def test_nothing_else_is_taken_for_experts() -> None:
    module = MODULES["MixtralExperts"]()
    module.gate_up_proj = nn.Parameter(module.gate_up_proj.to(torch.float8_e4m3fn), requires_grad=False)
    for other in (module, nn.Linear(3, 4), nn.Bilinear(2, 3, 4), nn.MultiheadAttention(4, 2), nn.Conv1d(2, 3, 1)):
        assert experts_of(other) is None
        with pytest.raises(TypeError, match=f"got {type(other).__name__}"):
            adapt_experts(other, {})
    module = MODULES["MixtralExperts"]()
    Adapted(module)
    assert experts_of(module) is None, "adapted already"


def test_what_does_not_fit_leaves_the_module_as_it_is() -> None:
    module = MODULES["MixtralExperts"]()
    bank = TTFactors(8, 12, 2, n_cores=15, dtype=torch.float64)
    good = (bank, Site(0, tuple(range(10)), experts=5))
    with pytest.raises(ValueError, match="expected some of"):
        adapt_experts(module, {"up_proj": good})
    with pytest.raises(ValueError, match="fits 5 experts"):
        adapt_experts(module, {"gate_up_proj": good, "down_proj": (bank, Site(0, tuple(range(5)), experts=5))})
    assert type(module) is type(MODULES["MixtralExperts"]())
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert not list(module.named_buffers())
    module.forward = module.forward
    with pytest.raises(TypeError, match="a forward was set on the module"):
        adapt_experts(module, {"gate_up_proj": good})
