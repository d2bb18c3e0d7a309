"""Test adapted parameters.

Code that reads the parameter as an attribute gets the sum of parameter and update. Code for state dicts, pruning,
tracing and similar tasks works with the stored parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from efft_kernels import EfftLinear, Site, TTFactors, use_backend
from efft_kernels.nn.effective import Effective
from efft_kernels.nn.parameter import AdaptedParameter, adapt_parameter, restore_module


class Own(nn.Module):
    """Multiply by the module's parameter in a custom way."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor] = lambda x, W: F.linear(x, W * 1.0)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.W = nn.Parameter(torch.randn(5, 7, dtype=torch.float64))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.W)


def bank(d_in: int = 7, d_out: int = 5) -> TTFactors:
    factors = TTFactors(d_in, d_out, (2, 3), dtype=torch.float64)
    for factor in factors.parameters():
        nn.init.normal_(factor)
    return factors


def adapted(*args: Any) -> tuple[Own, AdaptedParameter, Tensor]:
    """Return the module, its parameter, and an input."""
    module = Own(*args)
    return module, adapt_parameter(module, "W", bank(), Site()), torch.randn(3, 7, dtype=torch.float64)


def dense(parameter: AdaptedParameter) -> Tensor:
    f: Any = parameter.factors
    return parameter.stored.detach() + (f.U @ f.C[0, 0] @ f.V).t()


class Operators(TorchDispatchMode):
    """Record the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_metadata_costs_nothing_and_tells_nobody() -> None:
    module, parameter, _ = adapted()
    W = module.W
    assert type(W) is Effective
    assert isinstance(W, Tensor)
    assert not isinstance(W, nn.Parameter)
    with Operators() as seen:
        assert (W.shape, W.dtype, W.device, W.ndim, W.size(0)) == ((5, 7), torch.float64, torch.device("cpu"), 2, 5)
        assert not W.requires_grad, (
            "the tensor must be frozen like the parameter, because code that moves weights copies this flag"
        )
        assert W.is_floating_point()
        assert W.stride() == (7, 1)
    assert seen.names == []
    assert not any((parameter.binding.used, parameter.binding.read, parameter.binding.dense))
    assert repr(W) == "Effective(AdaptedParameter, shape=[5, 7])"


def test_putting_a_weight_away_takes_none_of_its_values() -> None:
    """accelerate's offloading moves a weight to the meta device. This must not compute the weight with its update."""
    module, parameter, _ = adapted()
    for away in (module.W.to("meta"), module.W.to(device=torch.device("meta"))):
        assert away.is_meta
        assert not away.requires_grad
    assert not parameter.binding.read
    assert module.W.to(torch.float32).dtype == torch.float32
    assert parameter.binding.read


def test_a_product_is_computed_without_the_dense_weight() -> None:
    module, parameter, x = adapted(F.linear)
    torch.testing.assert_close(module(x), F.linear(x, dense(parameter)))
    assert parameter.binding.read
    assert not parameter.binding.dense
    own = Own()
    other = adapt_parameter(own, "W", bank(), Site())
    own(x)
    assert other.binding.read
    assert other.binding.dense


def test_a_gradient_past_torchs_functions_reaches_the_factors() -> None:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, W: Tensor) -> Tensor:
            ctx.save_for_backward(x, W)
            return x @ W.t()

        @staticmethod
        def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, Tensor]:
            x, W = ctx.saved_tensors
            return gy @ W, gy.t() @ x

    module, parameter, x = adapted(Product.apply)
    leaves = [x.requires_grad_(), *parameter.factors.parameters()]
    outputs = (module(x), F.linear(x, dense(parameter)))
    first = [torch.autograd.grad(y.square().sum(), leaves, create_graph=True) for y in outputs]
    second = [torch.autograd.grad(sum(g.square().sum() for g in grads), leaves) for grads in first]
    for ours, theirs in (*zip(*first, strict=True), *zip(*second, strict=True)):
        torch.testing.assert_close(ours, theirs)


def test_one_read_with_and_without_gradients() -> None:
    module, parameter, x = adapted()
    W = module.W
    with torch.no_grad():
        y = x @ W.t()
    assert not y.requires_grad
    (gradient,) = torch.autograd.grad((x @ W.t()).sum(), parameter.factors.V)
    assert gradient.any()
    assert W.clone() is not W.clone()
    torch.testing.assert_close(W * 1, dense(parameter))


@pytest.mark.parametrize(
    "change",
    [
        lambda W: W.mul_(2),
        lambda W: W.copy_(torch.zeros(5, 7)),
        lambda W: nn.init.zeros_(W),
        lambda W: W.requires_grad_(),
        lambda W: setattr(W, "data", torch.zeros(5, 7)),
        lambda W: setattr(W, "grad", None),
    ],
)
def test_changes_that_would_be_lost_are_errors(change: Callable[[Tensor], object]) -> None:
    module, parameter, _ = adapted()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"change the stored parameter .* or disable the update"):
        change(module.W)
    parameter.enabled = False
    with torch.no_grad():
        change(module.W)


def test_everything_that_knows_parameters_has_the_stored_one() -> None:
    module, parameter, x = adapted()
    W = module._parameters["W"]
    assert list(module.state_dict()) == ["W"]
    assert module.state_dict()["W"].data_ptr() == W.data_ptr()
    assert list(module.parameters()) == [W]
    assert parameter.stored is parameter.weight is W
    assert type(module).__name__ == "Own"
    assert isinstance(module, Own)
    assert str(module).startswith("Own(W: rank=(2, 3), layer=0")
    new = nn.Parameter(torch.randn(5, 7, dtype=torch.float64))
    module.W = new
    assert parameter.stored is new
    torch.testing.assert_close(module(x), F.linear(x, dense(parameter)))
    module.load_state_dict(Own().state_dict())
    torch.testing.assert_close(module(x), F.linear(x, dense(parameter)))
    parameter.merge()
    assert list(module.state_dict()) == ["W"]
    module.float()
    assert parameter.base_weight.dtype == torch.float32
    parameter.unmerge()
    assert list(module.buffers()) == []
    assert torch.equal(parameter.stored, Own().W.float())


def test_functional_call_puts_other_values_in() -> None:
    module, parameter, x = adapted()
    other = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    y = torch.func.functional_call(module, {"W": other}, (x,))
    expected = F.linear(x, other + dense(parameter) - parameter.stored)
    torch.testing.assert_close(y, expected)
    for ours, theirs in zip(*(torch.autograd.grad(t.sum(), other) for t in (y, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)
    with use_backend("reference"):
        torch.testing.assert_close(torch.vmap(module)(x[None])[0], F.linear(x, dense(parameter)))
        jacobian = torch.func.jacrev(module)(x[0])
    torch.testing.assert_close(jacobian, dense(parameter))


def test_pruning_and_taking_that_back() -> None:
    module, parameter, x = adapted()
    parameter.enabled = False
    prune.random_unstructured(module, "W", 0.5)
    parameter.enabled = True
    update = parameter.delta_weight()
    torch.testing.assert_close(module(x), F.linear(x, module.W_orig * module.W_mask + update))
    parameter.enabled = False
    prune.remove(module, "W")
    parameter.enabled = True
    torch.testing.assert_close(module(x), F.linear(x, dense(parameter)))
    assert list(module.state_dict()) == ["W"]


def test_there_is_no_attribute_where_there_is_no_parameter() -> None:
    module, _, _ = adapted()
    del module.W
    assert not hasattr(module, "W")
    with pytest.raises(AttributeError, match="object has no attribute 'W'"):
        module.W  # noqa: B018
    with pytest.raises(AttributeError):
        del module.W


def test_an_attribute_error_inside_does_not_bring_the_stored_weight() -> None:
    class Broken(TTFactors):
        def compose(self, sites: Any) -> Any:
            return self.what_is_not_there

    module, factors = Own(), Broken(7, 5, 2, dtype=torch.float64)
    adapt_parameter(module, "W", factors, Site())
    with pytest.raises(RuntimeError, match="the effective W of a Own failed: 'Broken' object has no attribute"):
        module.W  # noqa: B018


class WithBank(nn.Module):
    def __init__(self, module: Own, factors: nn.Module) -> None:
        super().__init__()
        self.module, self.factors = module, factors

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("function", [F.linear, lambda x, W: F.linear(x, W * 1.0)], ids=["linear", "other"])
def test_traced_and_exported(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    module, parameter, x = adapted(function)
    expected = module(x)
    whole = WithBank(module, parameter.factors)
    torch.testing.assert_close(torch.jit.trace(whole, x)(x), expected)
    torch.testing.assert_close(torch.export.export(whole, (x,)).module()(x), expected)
    graph = torch.fx.symbolic_trace(module)
    with torch.no_grad():
        next(parameter.factors.parameters()).mul_(2)
    torch.testing.assert_close(graph(x), F.linear(x, dense(parameter)))


def test_a_checkpoint_runs_it_again_with_the_same_factors() -> None:
    """The backward pass runs the layer again and needs the weight with the update of the forward pass.

    Outside of a pass, ``layer.weight`` is the stored weight.
    """

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(7, 5, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.layer.weight, self.layer.bias).tanh()

    factors = bank()
    factors.dropout = 0.3
    parent, x = Parent(), torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    plain = parent.layer
    parent.layer = layer = EfftLinear(plain, factors, Site())
    assert parent.layer.weight is layer.stored
    results = []
    for run in (parent, lambda x: checkpoint(parent, x, use_reentrant=False)):
        torch.manual_seed(0)
        factors.prepare()
        assert type(layer.weight) is Effective
        y = run(x)
        assert factors.release() == []
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *factors.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert layer.weight is plain.weight


def test_a_layer_that_is_not_used_is_told_from_one_that_is_read() -> None:
    factors = bank()
    layer = EfftLinear(nn.Linear(7, 5, dtype=torch.float64), factors, Site())
    factors.prepare()
    assert layer.weight.dtype == torch.float64
    assert factors.release() == [layer.binding]
    factors.prepare()
    layer.weight.sum()
    assert factors.release() == []
    assert layer.binding.read
    assert layer.binding.dense
    layer.read = True
    assert type(layer.weight) is Effective
    layer.merge()
    assert layer.weight is layer.stored


def test_two_parameters_of_one_module() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.A, self.B = (nn.Parameter(torch.randn(5, 7, dtype=torch.float64)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.A) + F.linear(x, self.B).exp()

    module, other = Two(), Two()
    x, weights = torch.randn(2, 7, dtype=torch.float64), []
    for name in ("B", "A"):
        weights.append(adapt_parameter(module, name, bank(), Site()))
        adapt_parameter(other, name, bank(), Site())
    assert type(module) is type(other)
    expected = F.linear(x, dense(weights[1])) + F.linear(x, dense(weights[0])).exp()
    torch.testing.assert_close(module(x), expected)
    restore_module(module)
    assert type(module) is Two
    assert not hasattr(module, "adapted_parameters")
    restore_module(module)


class Packed(Tensor):
    def __tensor_flatten__(self) -> Any:
        raise NotImplementedError


def cases_refused() -> list[tuple[nn.Module, str, str, str]]:
    parametrized = parametrize.register_parametrization(nn.Linear(3, 3), "weight", nn.Identity())
    packed = nn.Linear(3, 3)
    packed.weight = nn.Parameter(torch.zeros(3, 3).as_subclass(Packed), requires_grad=False)
    twice = Own()
    adapt_parameter(twice, "W", bank(), Site())
    return [
        (nn.Linear(3, 3), "other", "linear", "there is no such parameter"),
        (nn.Linear(3, 3), "bias", "linear", r"expected 2 dimensions, got shape \[3\]"),
        (nn.Conv1d(3, 3, 2), "weight", "linear", r"expected 2 dimensions, got shape \[3, 3, 2\]"),
        (nn.Linear(3, 3), "bias", "convolution", r"expected 2 or more dimensions, got shape \[3\]"),
        (parametrized, "weight", "linear", "it is parametrized; remove the parametrization first"),
        (packed, "weight", "linear", "it is a Packed, not a plain dense tensor"),
        (twice, "W", "linear", "it is adapted already"),
        (EfftLinear.from_linear(nn.Linear(3, 3)), "weight", "linear", "it is adapted already"),
        (nn.LSTM(3, 3), "weight_ih_l0", "linear", "torch's recurrent layers cannot be adapted"),
        (nn.LazyLinear(3), "weight", "linear", "its shape is not known before the module's first call"),
    ]


@pytest.mark.parametrize("case", range(10))
def test_what_is_refused(case: int) -> None:
    module, name, view, message = cases_refused()[case]
    kind = type(module)
    with pytest.raises(TypeError, match=f"{name} of .*: {message}"):
        adapt_parameter(module, name, bank(3, 3), Site(), view)
    assert type(module) is kind


def test_what_does_not_fit() -> None:
    module, factors = Own(), bank(5, 7)
    with pytest.raises(ValueError, match=r"W of Own: .* = \(5, 7\), got \(7, 5\)"):
        adapt_parameter(module, "W", factors, Site())
    with pytest.raises(
        ValueError, match="view must be one of 'linear', 'transposed', 'convolution', 'stacked', got 'rows'"
    ):
        adapt_parameter(module, "W", factors, Site(), "rows")
    assert type(module) is Own
    assert factors.bindings == []
    adapt_parameter(module, "W", factors, Site(), "transposed")
    parametrize.register_parametrization(module, "W", nn.Identity(), unsafe=True)
    with pytest.raises(RuntimeError, match="got another class after it was adapted; undo that change first"):
        restore_module(module)
