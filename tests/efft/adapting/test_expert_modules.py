"""Test adapted expert modules of transformers; such a module holds the weights of all experts of one MoE layer.

The oracle is the same module whose weights contain the dense updates, in fp64. Other tests check which modules count as
expert modules.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from efft.adapting.experts import AdaptedExperts, DispatchedExperts, adapt_experts, experts_of
from efft_kernels import Site, TTFactors
from efft_kernels.nn.parameter import restore_module
from tests.adapted_experts import AdaptedModel

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'efft-kernels[hf]'")


def modules() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield expert modules of several classes in fp64.

    They include modules with biases, with interleaved or transposed weights, without a gate, and with a final norm.
    """
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
#: For each test id, the two experts of each token.
CHOICES = {
    "some without a token": [[0, 2], [2, 3], [2, 0], [3, 2]],
    "one token for one": [[1, 4], [4, 1], [4, 3]],
    "one token": [[3, 0]],
    "no token": [],
}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("choice", CHOICES)
def test_a_module_and_its_gradients(kind: str, choice: str) -> None:
    """The oracle runs the original forward of the class with the sums of weights and dense updates, under autograd."""
    plain, module = MODULES[kind](), MODULES[kind]()
    adapted = AdaptedModel(module)
    chosen = torch.tensor(CHOICES[choice], dtype=torch.long).view(-1, 2)
    x = torch.randn(len(chosen), 8, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(chosen.shape, dtype=torch.float64, requires_grad=True)
    y = module(x, chosen, weights)
    exact = torch.func.functional_call(plain, adapted.effective(), (x, chosen, weights))
    exact = exact + 0 * x * weights.sum()  # without tokens, the output may have no graph
    close = {"atol": 1e-5, "rtol": 1e-5} if kind == "MuseSparkExperts" else {}  # the norm of this class uses fp32
    torch.testing.assert_close(y, exact, **close)
    wanted = [x, weights, *adapted.bank.parameters()]
    gy = torch.randn_like(y)
    got = torch.autograd.grad(y, wanted, gy, allow_unused=True, materialize_grads=True)
    right = torch.autograd.grad(exact, wanted, gy, allow_unused=True, materialize_grads=True)
    for one, two in zip(got, right, strict=True):
        torch.testing.assert_close(one, two, **close)


@pytest.mark.parametrize("kind", MODULES)
def test_one_update_of_two(kind: str) -> None:
    """One parameter is merged or disabled, while the forward pass applies the update of the other parameter."""
    module = MODULES[kind]()
    adapted = AdaptedModel(module)
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
    adapted = AdaptedModel(model)
    model["bank"] = adapted.bank
    chosen, x = torch.tensor(CHOICES["one token for one"]), torch.randn(3, 8, dtype=torch.float64)
    weights = torch.rand(chosen.shape, dtype=torch.float64)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        experts = copied["experts"]
        assert type(experts) is type(model["experts"])
        assert torch.equal(experts(x, chosen, weights), model["experts"](x, chosen, weights))
        assert isinstance(experts, DispatchedExperts)
        for weight in experts.adapted_parameters.values():
            assert weight.factors is copied["bank"]
        restore_module(experts)
        assert type(experts) is type(MODULES["GptOssExperts"]())
        assert isinstance(model["experts"], AdaptedExperts)
    assert "GptOssExperts" in repr(model)
    assert "gate_up_proj: rank=(3, 4), layer=0, experts=5" in repr(model)


@pytest.mark.parametrize("kind", MODULES)
def test_a_compiled_graph_without_breaks(kind: str) -> None:
    module = MODULES[kind]().float()
    adapted = AdaptedModel(module)
    chosen, x = torch.tensor(CHOICES["one token for one"]), torch.randn(3, 8)
    weights = torch.rand(chosen.shape)
    y = module(x, chosen, weights)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(x, chosen, weights)
    torch.testing.assert_close(compiled, y)
    for one, two in zip(
        *(torch.autograd.grad(out.sin().sum(), list(adapted.bank.parameters())) for out in (compiled, y)), strict=True
    ):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("kind", ["Llama4TextExperts", "Step3p7Experts"])
def test_a_forward_that_nothing_can_intercept(kind: str) -> None:
    """The library cannot intercept the products of these classes, so the modules read sums of weights and updates."""
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
    from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

    config = transformers.PretrainedConfig()
    sizes = {"hidden_size": 8, "intermediate_size": 12, "moe_intermediate_size": 12, "num_local_experts": 4}
    config.__dict__.update(sizes, hidden_act="silu")
    module = {"Llama4TextExperts": Llama4TextExperts, "Step3p7Experts": Step3p7Experts}[kind](config).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    plain = copy.deepcopy(module)
    found = experts_of(module)
    assert found.kind is None
    assert [p.transposed for p in found.parameters] == [kind == "Llama4TextExperts"] * 2
    adapted = AdaptedModel(module)
    x = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    routing = (torch.tensor([[0, 2]] * 8), torch.rand(8, 2, dtype=torch.float64)) if kind == "Step3p7Experts" else ()
    y = module(x, *routing)
    exact = torch.func.functional_call(plain, adapted.effective(), (x, *routing))
    torch.testing.assert_close(y, exact)
    wanted = [x, *adapted.bank.parameters()]
    for one, two in zip(
        torch.autograd.grad(y.sin().sum(), wanted), torch.autograd.grad(exact.sin().sum(), wanted), strict=True
    ):
        torch.testing.assert_close(one, two)
    for weight in adapted.weights.values():
        weight.merge()
    torch.testing.assert_close(module(x, *routing), exact)
    restore_module(module)
    assert torch.equal(module(x, *routing), plain(x, *routing))


def test_a_pickle_that_another_process_reads(tmp_path: Path) -> None:
    """The process that reads the pickle has not adapted any experts."""
    module = MODULES["MixtralExperts"]()
    adapted = AdaptedModel(module)
    arguments = (
        torch.randn(3, 8, dtype=torch.float64),
        torch.tensor([[0, 1]] * 3),
        torch.rand(3, 2, dtype=torch.float64),
    )
    torch.save((module, adapted.bank, arguments, module(*arguments)), tmp_path / "all")
    code = (
        "import sys, torch; from efft.adapting.experts import DispatchedExperts\n"
        "module, _, arguments, y = torch.load(sys.argv[1], weights_only=False)\n"
        "assert isinstance(module, DispatchedExperts) and torch.equal(module(*arguments), y)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "all")], env=environment, check=True)


# Recognition of expert modules


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
    AdaptedModel(module)
    assert experts_of(module) is None, "an adapted module must not be adapted again"


def test_what_does_not_fit_leaves_the_module_as_it_is() -> None:
    module = MODULES["MixtralExperts"]()
    bank = TTFactors(8, 12, 2, n_cores=15, dtype=torch.float64)
    good = (bank, Site(0, tuple(range(10)), experts=5))
    with pytest.raises(ValueError, match="expected some of"):
        adapt_experts(module, {"up_proj": good})
    with pytest.raises(ValueError, match=r"= \(8, 12\), got \(12, 8\)"):
        adapt_experts(module, {"gate_up_proj": good, "down_proj": (bank, Site(0, tuple(range(5)), experts=5))})
    assert type(module) is type(MODULES["MixtralExperts"]())
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert not list(module.named_buffers())
    module.forward = module.forward
    with pytest.raises(TypeError, match="a forward was set on the module"):
        adapt_experts(module, {"gate_up_proj": good})
