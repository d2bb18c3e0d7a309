"""Test that EfftLinear equals a frozen nn.Linear plus the dense update in every layout, and can replace nn.Linear.

A bank is the module that holds factors. It can belong to one layer or be shared by many layers.
"""

from __future__ import annotations

import copy
import io
import pickle
import shutil
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efft_kernels import EfftLinear, Site, TTFactors, can_run, use_backend
from efft_kernels.testing import backends

HAS_CPP_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))


def randomise(layer: EfftLinear) -> EfftLinear:
    for factor in (layer.factors.U, layer.factors.C, layer.factors.V):
        nn.init.normal_(factor, std=0.5)
    return layer


def output_and_gradients(layer: nn.Module, x: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    y = layer(x)
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]


@pytest.mark.parametrize("backend", [b for b in backends() if can_run(b, torch.ones(1).double()) is None])
@pytest.mark.parametrize("bias", [True, False])
def test_every_layout(
    make_bank: Callable[..., Any],
    update: Callable[..., Tensor],
    kind: str,
    core_sharing: str,
    bias: bool,
    backend: Any,
) -> None:
    """A single layer, fused qkv, column ranges and fc2's transposed tensor train all equal F.linear with W + ΔWᵀ."""
    bank, sites = make_bank(kind, n_layers=2, core_sharing=core_sharing)
    for site in sites:
        linear = nn.Linear(*bank.sizes(site), bias=bias, dtype=torch.float64)
        layer = EfftLinear(linear, bank, site)
        x = torch.randn(2, 3, layer.in_features, dtype=torch.float64, requires_grad=True)
        leaves = [x, bank.U, bank.C, bank.V]
        with use_backend(backend):
            got = output_and_gradients(layer, x, leaves)

        def dense(x: Tensor, layer: EfftLinear = layer) -> Tensor:
            return F.linear(x, layer.weight + update(bank, layer.site).t(), layer.bias)

        for a, b in zip(got, output_and_gradients(dense, x, leaves), strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(layer.delta_weight(), update(bank, site).t().detach())


@pytest.mark.parametrize("init", ["u", "v"])
def test_step_zero_changes_nothing(init: str) -> None:
    """Output and dx exactly equal those of the base layer. Only the factor that is zero gets a nonzero gradient."""
    linear = nn.Linear(6, 9)
    layer = EfftLinear.from_linear(linear, rank=3, n_cores=3, init=init)
    x = torch.randn(4, 6, requires_grad=True)
    y, dx = output_and_gradients(layer, x, [x])
    expected, expected_dx = output_and_gradients(lambda x: F.linear(x, linear.weight, linear.bias), x, [x])
    assert torch.equal(y, expected)
    assert torch.equal(dx, expected_dx)
    layer(x).square().sum().backward()
    grads = {name: bool(p.grad.any()) for name, p in layer.factors.named_parameters()}
    assert grads == {name: name == init.upper() for name in "UCV"}


def test_a_plain_linear_layer_to_everyone_else() -> None:
    linear = nn.Linear(6, 4).eval()
    bank = TTFactors(6, 4, 2)
    layer = EfftLinear(linear, bank, Site())
    assert isinstance(layer, nn.Linear)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.weight.requires_grad
    assert not layer.bias.requires_grad
    assert not layer.training
    assert list(layer.state_dict()) == ["weight", "bias"], "a shared bank is not part of the layer"
    assert list(layer.parameters()) == [linear.weight, linear.bias]
    assert list(layer.modules()) == [layer]
    layer.load_state_dict(nn.Linear(6, 4).state_dict())
    nn.Linear(6, 4).load_state_dict(layer.state_dict())
    assert EfftLinear.from_linear(nn.Linear(6, 4, bias=False), bank).bias is None


def test_a_layer_with_factors_of_its_own() -> None:
    layer = EfftLinear.from_linear(nn.Linear(6, 12), rank=(2, 3), n_cores=3, scale=0.5, dropout=0.1, init="u")
    bank = layer.factors
    assert list(layer.state_dict()) == ["weight", "bias", "factors.U", "factors.C", "factors.V"]
    assert (bank.d_in, bank.d_out, bank.r1, bank.r2, bank.n_cores) == (6, 4, 2, 3, 3)
    assert (bank.scale, bank.dropout, bank.init) == (0.5, 0.1, "u")
    assert layer.site == Site(cores=(0, 1, 2))
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["factors.U", "factors.C", "factors.V"]
    assert layer.eval().factors.training is False
    for dtype, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        own = EfftLinear.from_linear(nn.Linear(6, 4, dtype=dtype), rank=2)
        assert own.factors.U.dtype == expected
        assert own(torch.ones(2, 6, dtype=dtype)).dtype == dtype
    assert EfftLinear.from_linear(nn.Linear(6, 4, device="meta"), rank=2).factors.U.is_meta


def test_from_linear_with_a_bank() -> None:
    bank = TTFactors(6, 4, 2, n_layers=2, n_cores=2)
    layer = EfftLinear.from_linear(nn.Linear(6, 8), bank, Site(1, (0, 1)))
    assert layer.factors is bank
    assert [b.site for b in bank.bindings] == [Site(1, (0, 1))]
    assert EfftLinear.from_linear(nn.Linear(6, 4), bank).site == Site()


class OtherLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize("given_bank", [True, False])
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.ReLU(), "EfftLinear: expected an nn.Linear, got ReLU"),
        (nn.Conv2d(8, 8, 1), "EfftLinear: expected an nn.Linear, got Conv2d"),
        (OtherLinear(8, 8), "EfftLinear: OtherLinear has its own forward method, which the adapted layer would"),
        (
            EfftLinear.from_linear(nn.Linear(8, 8)),
            "this layer is adapted already: it is of type EfftLinear",
        ),
        (nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "weight is parametrized; remove the parametrization"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_what_cannot_be_adapted(module: nn.Module, message: str, given_bank: bool) -> None:
    with pytest.raises(TypeError, match=message):
        EfftLinear.from_linear(module, TTFactors(8, 8, 2) if given_bank else None)


def test_the_output_may_be_changed_in_place() -> None:
    """The output of nn.Linear may also be changed in place, by an in-place ReLU or by an added bias."""
    layer = EfftLinear.from_linear(nn.Linear(6, 4, dtype=torch.float64), rank=2, init="u")
    nn.init.normal_(layer.factors.U)
    leaves = list(layer.factors.parameters())
    for shape in ((6,), (3, 6), (2, 3, 6)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        y = layer(x)
        y += 1
        torch.relu_(y)
        expected = torch.autograd.grad(torch.relu(layer(x) + 1).square().sum(), [x, *leaves])
        for a, b in zip(torch.autograd.grad(y.square().sum(), [x, *leaves]), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_the_update_in_the_middle_of_a_pass_has_no_dropout() -> None:
    bank = TTFactors(6, 4, 2, dropout=0.5)
    nn.init.normal_(bank.V)
    layer = EfftLinear(nn.Linear(6, 4), bank, Site())
    expected = (bank.U @ bank.C[0, 0] @ bank.V).t()
    bank.prepare()
    torch.testing.assert_close(layer.delta_weight(), expected)
    layer.merge()
    bank.release()
    layer.unmerge()
    torch.testing.assert_close(layer.delta_weight(), expected)


def test_sizes_that_do_not_fit() -> None:
    bank = TTFactors(6, 4, 2, n_cores=3)
    message = r"cores=\(0,\), .* fits a linear layer with \(in_features, out_features\) = \(6, 4\), got \(6, 12\)"
    with pytest.raises(ValueError, match=message):
        EfftLinear(nn.Linear(6, 12), bank, Site())
    with pytest.raises(ValueError, match=r"= \(4, 6\), got \(6, 4\)"):
        EfftLinear(nn.Linear(6, 4), bank, Site(transpose=True))
    with pytest.raises(ValueError, match=r"= \(6, 2\), got \(6, 4\)"):
        EfftLinear(nn.Linear(6, 4), bank, Site(columns=(1, 3)))
    assert bank.bindings == []
    for n_cores in (5, 0):
        with pytest.raises(ValueError, match=f"out_features must be a multiple of n_cores, got 12 and {n_cores}"):
            EfftLinear.from_linear(nn.Linear(6, 12), n_cores=n_cores)
    with pytest.raises(ValueError, match="rank, n_cores, scale, dropout and init belong to the bank"):
        EfftLinear.from_linear(nn.Linear(6, 4), bank, scale=2.0)


def test_switched_off_it_is_its_base() -> None:
    layer = randomise(EfftLinear.from_linear(nn.Linear(6, 4), rank=2))
    x = torch.randn(3, 6)
    assert not torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    layer.enabled = False
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert layer.extra_repr().endswith(", disabled")


def test_delta_weight_has_no_dropout_and_no_autocast() -> None:
    layer = randomise(EfftLinear.from_linear(nn.Linear(6, 4), rank=2, dropout=0.5, scale=3.0))
    U, C, V = (p.detach().double() for p in (layer.factors.U, layer.factors.C, layer.factors.V))
    expected = 3 * (U @ C[0, 0] @ V).t()
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            delta = layer.delta_weight()
        torch.testing.assert_close(delta, expected.float())
    assert not delta.requires_grad
    assert layer.factors.training


def duplicates(module: nn.Module) -> list[nn.Module]:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)]


def test_copies_and_pickles() -> None:
    """A copied model has its own bank and computes the same output."""
    bank = TTFactors(6, 6, 2, n_layers=2)
    model = nn.Sequential(*[randomise(EfftLinear(nn.Linear(6, 6), bank, Site(i))) for i in range(2)])
    model.bank = bank
    x = torch.randn(3, 6)
    for made in duplicates(model):
        assert made[0].factors is made[1].factors is made.bank is not bank
        assert torch.equal(made[1](made[0](x)), model[1](model[0](x)))
        with torch.no_grad():
            made.bank.C.zero_()
        assert bank.C.any()
    for made in duplicates(randomise(EfftLinear.from_linear(nn.Linear(6, 4), rank=2))):
        assert list(made.state_dict()) == ["weight", "bias", "factors.U", "factors.C", "factors.V"]


def test_other_dtypes() -> None:
    layer = randomise(EfftLinear.from_linear(nn.Linear(6, 4), rank=2))
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    x = torch.randn(3, 6)
    torch.testing.assert_close(half(x.bfloat16()).float(), layer(x), rtol=0.05, atol=0.05)
    bank = TTFactors(6, 4, 2)
    shared = EfftLinear(nn.Linear(6, 4), bank, Site()).to(torch.bfloat16)
    assert bank.U.dtype == torch.float32, "casting a layer does not cast a shared bank"
    assert shared(x.bfloat16()).dtype == torch.bfloat16


def test_meta_layers_give_shapes() -> None:
    layer = EfftLinear.from_linear(nn.Linear(6, 12, device="meta"), rank=2, n_cores=3)
    assert layer(torch.empty(2, 5, 6, device="meta")).shape == (2, 5, 12)


@pytest.mark.filterwarnings("error")
def test_repr() -> None:
    linear = "in_features=4, out_features=8, bias=True"
    bank = TTFactors(8, 4, (2, 3), n_layers=2, n_cores=3, scale=0.5, trainable_scale=True)
    layer = EfftLinear(nn.Linear(4, 8), bank, Site(1, (2,), transpose=True))
    assert repr(layer) == f"EfftLinear({linear}, rank=(2, 3), layer=1, cores=(2,), transpose=True, scale=0.5)"
    bank = TTFactors(4, 9, 2)
    layer = EfftLinear(nn.Linear(4, 8), bank, Site(columns=(1, 9)))
    layer.merge()
    assert repr(layer) == f"EfftLinear({linear}, rank=(2, 2), layer=0, cores=(0,), columns=(1, 9), scale=1, merged)"


# Compilation

COMPILERS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(not HAS_CPP_COMPILER, reason="inductor needs a C++ compiler in PATH"),
            pytest.mark.skipif(sys.platform == "win32", reason="on Windows, inductor needs MSVC"),
        ],
    ),
]


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiles_without_graph_breaks(make_stack: Callable[..., Any], compiler: str) -> None:
    """Compile the preparation of a bank and all its layers in one graph, without and with dropout of the factors."""
    stack = make_stack("mlp", n_layers=2, dropout=0.0, dtype=torch.float32)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = stack

        def forward(self, *inputs: Tensor) -> Tensor:
            self.stack.bank.prepare()
            outputs = [layer(x) for layer, x in zip(self.stack.layers, inputs, strict=True)]
            self.stack.bank.release()
            return sum(y.square().sum() for y in outputs)

    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    leaves = [*stack.inputs, *stack.bank.parameters()]
    expected = torch.autograd.grad(model(*stack.inputs), leaves)
    for got, value in zip(torch.autograd.grad(compiled(*stack.inputs), leaves), expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-4)
    stack.bank.dropout = 0.5
    losses = {compiled(*stack.inputs).item() for _ in range(3)}
    assert len(losses) == 3, "every pass draws new masks"
    torch.autograd.grad(compiled(*stack.inputs), leaves)


def test_a_compiled_layer_in_an_eager_pass_is_compiled_once(make_stack: Callable[..., Any]) -> None:
    stack, graphs = make_stack("mlp", n_layers=2, dropout=0.1), []

    def collect(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    stack.layers[0].compile(backend=collect, fullgraph=True)
    for _ in range(3):
        stack.run().backward()
    assert len(graphs) == 1
