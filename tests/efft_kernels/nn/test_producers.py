"""Test producers: layer norms and GELUs whose output an adapted layer computes itself.

``fuse_producer`` changes such a module. The module then returns a ``ProducerOutput``, an object that holds the module's
input. The adapted layer computes the module's output from this input. All other consumers get the usual output.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from efft_kernels import EfftLinear
from efft_kernels.nn.producers import ProducerOutput, fuse_producer, unfuse_producer
from efft_kernels.testing import assert_close_budget

MODULES = {
    "norm": lambda: nn.LayerNorm(24, eps=1e-3),
    "plain norm": lambda: nn.LayerNorm(24, elementwise_affine=False),
    "gelu": nn.GELU,
    "gelu tanh": lambda: nn.GELU(approximate="tanh"),
}


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> nn.Module:
    module = MODULES[request.param]()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    assert fuse_producer(module.requires_grad_(False))
    return module


@pytest.fixture
def layer() -> EfftLinear:
    layer = EfftLinear.from_linear(nn.Linear(24, 40), rank=5)
    nn.init.normal_(layer.factors.V)
    return layer


def plain(module: nn.Module, x: Tensor) -> Tensor:
    return type(module).forward(module, x)


def inputs(**options: Any) -> Tensor:
    return (3 * torch.randn(2, 7, 24) + 1).to(**options).requires_grad_()


def keep(forward: Any) -> tuple[Tensor, list[tuple[int, ...]]]:
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return forward(), kept


class OneAdded(nn.LayerNorm):
    """A norm like transformers' ``NemotronLayerNorm1P``, which adds 1 to its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class InFp32(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class ChannelsFirst(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.movedim(-1, 1)


class Sharper(nn.GELU):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(1.702 * x)


class Renamed(nn.GELU):
    """A subclass without a forward method of its own."""


class GELUOfALibrary(nn.Module):
    """A GELU that does not inherit from ``nn.GELU``, like those of transformers."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x.pow(3))))


class ClippedGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x).clip(-10, 10)


class LearnedGELU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.slope * x)


@pytest.mark.parametrize(
    ("module", "fused"),
    [
        *((OneAdded(24), False), (InFp32(24), True), (ChannelsFirst(24), False), (Sharper(), False), (Renamed(), True)),
        *((GELUOfALibrary(), True), (ClippedGELU(), False), (LearnedGELU(), False)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_subclass_is_fused_only_if_it_computes_the_same(module: nn.Module, fused: bool, layer: EfftLinear) -> None:
    x = torch.randn(2, 24, 24)
    with torch.no_grad():
        expected = layer(module(x))
        assert fuse_producer(module) is fused
        torch.testing.assert_close(layer(module(x)), expected, rtol=1e-4, atol=1e-4)


def test_a_subclass_on_the_meta_device_is_judged_as_well() -> None:
    assert fuse_producer(InFp32(24, device="meta"))
    assert not fuse_producer(OneAdded(24, device="meta"))


def test_an_adapted_layer_does_both(module: nn.Module, layer: EfftLinear) -> None:
    x = inputs()
    a = module(x)
    assert isinstance(a, ProducerOutput)
    assert (a.shape, a.dtype, a.device, a.requires_grad) == (x.shape, x.dtype, x.device, True)
    assert type(module).__name__ in repr(a)
    y, kept = keep(lambda: layer(module(x)))
    assert kept.count((2, 7, 24)) == 2, (
        "the autograd nodes of module and layer save the input of the module, and not its output"
    )
    assert (14, 24) not in kept
    leaves = [x, *layer.factors.parameters()]
    upstream = torch.randn_like(y)
    got = [y, *torch.autograd.grad(y, leaves, upstream)]
    peer_y = layer(plain(module, x))
    peer = [peer_y, *torch.autograd.grad(peer_y, leaves, upstream)]
    wide_module, wide_layer = copy.deepcopy(module).double(), copy.deepcopy(layer).double()
    wide_x = x.detach().double().requires_grad_()
    exact_y = wide_layer(plain(wide_module, wide_x))
    exact = [exact_y, *torch.autograd.grad(exact_y, [wide_x, *wide_layer.factors.parameters()], upstream.double())]
    for one, formula, usual in zip(got, exact, peer, strict=True):
        assert_close_budget(one, formula, usual)


@pytest.mark.parametrize("state", ["disabled", "merged"])
def test_a_layer_without_its_update(module: nn.Module, layer: EfftLinear, state: str) -> None:
    x = inputs()
    if state == "merged":
        layer.merge()
    else:
        layer.enabled = False
    assert torch.equal(layer(module(x)), F.linear(plain(module, x), layer.weight, layer.bias))


@pytest.mark.parametrize(
    "touch",
    [
        lambda a: a + 1,
        lambda a: 2 * a,
        lambda a: a[:, 0],
        lambda a: a.mT.contiguous(),
        lambda a: torch.cat([a, a]),
        lambda a: a.detach().clone(),
        lambda a: F.linear(a, torch.ones(3, 24)),
        lambda a: a.data,
        lambda a: F.dropout(a, 0.0).sum(),
        lambda a: torch.from_numpy(a.detach().numpy()),
    ],
)
def test_whatever_else_touches_it(module: nn.Module, touch: Any) -> None:
    x = inputs()
    got, expected = touch(module(x)), touch(plain(module, x))
    assert type(got) is Tensor
    assert torch.equal(got, expected)
    assert got.requires_grad == expected.requires_grad
    if got.requires_grad:
        grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (got, expected)]
        assert torch.equal(*grads)


def replace_first_column(a: Tensor) -> None:
    a[:, 0] = 1.0


def double_a_view(a: Tensor) -> None:
    view = a.flatten(0, 1)[:3]
    view.mul_(2)


@pytest.mark.parametrize(
    "change",
    [lambda a: a.add_(1), lambda a: F.relu_(a), lambda a: a.detach().mul_(3), replace_first_column, double_a_view],
    ids=["method", "function", "detached", "assignment", "view"],
)
def test_an_output_changed_in_place(module: nn.Module, layer: EfftLinear, change: Any) -> None:
    """The change reaches every later reader, including adapted layers."""
    results = []
    for compute in (module, lambda x: plain(module, x)):
        x = inputs()
        with torch.no_grad():
            x.copy_(torch.linspace(-3, 3, x.numel()).view_as(x))
        a = compute(x)
        change(a)
        y = layer(a)
        results.append([y, a + 0, *torch.autograd.grad(y.square().sum() + (a * a).sum(), [x, layer.factors.U])])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_an_output_changed_without_a_graph(module: nn.Module, layer: EfftLinear) -> None:
    """A change under ``torch.no_grad`` must not cut the output off from the autograd graph of the input."""
    x = inputs()
    grads = []
    for compute in (module, lambda x: plain(module, x)):
        a = compute(x)
        with torch.no_grad():
            a[:, 0] = 1.0
        grads.append(torch.autograd.grad(layer(a).square().sum(), x)[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def set_data(a: Tensor) -> None:
    a.data = torch.ones_like(a)


@pytest.mark.parametrize(
    "change",
    [lambda a: a.data.mul_(2), set_data, lambda a: a.numpy().fill(3), lambda a: torch.from_dlpack(a).mul_(2)],
    ids=["data", "set data", "numpy", "dlpack"],
)
def test_a_change_that_increases_no_version_counter(module: nn.Module, layer: EfftLinear, change: Any) -> None:
    with torch.no_grad():
        x = inputs()
        results = []
        for compute in (module, lambda x: plain(module, x)):
            a = compute(x)
            change(a)
            results.append(layer(a))
    torch.testing.assert_close(*results)


def hook(a: Tensor) -> Tensor:
    a.register_hook(lambda gy: 3 * gy)
    return a


def detach(a: Tensor) -> Tensor:
    return a.detach_()


def require(a: Tensor) -> Tensor:
    a = a.detach_()
    a.requires_grad = True
    assert a.requires_grad
    return a


def retain(a: Tensor) -> Tensor:
    a.retain_grad()
    return a


@pytest.mark.parametrize("change", [hook, detach, require, retain])
def test_an_output_that_autograd_treats_in_another_way(module: nn.Module, layer: EfftLinear, change: Any) -> None:
    """Adapted layers must not pass the gradient directly to the input of the producer."""
    x = inputs()
    results = []
    for compute in (module, lambda x: plain(module, x)):
        x.grad = None
        a = change(compute(x))
        layer(a).square().sum().backward()
        results.append([x.grad, a.grad if change in (require, retain) else None])
    for got, expected in zip(*results, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_gradient_of_the_output(module: nn.Module, layer: EfftLinear) -> None:
    x = inputs()
    a = module(x)
    y = layer(a).square().sum()
    with pytest.raises(RuntimeError, match=r"gradient of the output of a fused .* is not known"):
        torch.autograd.grad(y, a, allow_unused=True)
    kept, usual = retain(module(x)), plain(module, x)
    grads = [torch.autograd.grad(layer(a).square().sum(), a)[0] for a in (kept, usual)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use", ["layer", "value"])
def test_an_output_that_autograd_did_not_record(layer: EfftLinear, use: str) -> None:
    """No gradient may reach the input and the parameters of a norm that was called under ``torch.no_grad``."""
    norm, x = nn.LayerNorm(24), inputs()
    assert fuse_producer(norm)
    with torch.no_grad():
        a = norm(x)
    y = layer(a if use == "layer" else a * 1)
    torch.testing.assert_close(y, layer(plain(norm, x)))
    grads = torch.autograd.grad(y.square().sum(), [x, *norm.parameters(), layer.factors.U], allow_unused=True)
    assert [grad is None for grad in grads] == [True, True, True, False]


def test_a_norm_under_reentrant_checkpointing(layer: EfftLinear) -> None:
    """Autograd does not record the first call of the norm, but gradients pass through the checkpoint."""
    norm, x = nn.LayerNorm(24), inputs()
    assert fuse_producer(norm)
    results = []
    for compute in (norm, lambda x: plain(norm, x)):
        norm.zero_grad()
        x.grad = None
        layer(checkpoint(compute, x, use_reentrant=True)).square().sum().backward()
        results.append([x.grad, norm.weight.grad, norm.bias.grad])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use", ["layer", "value", "function"])
def test_parameters_that_are_replaced_during_the_call(layer: EfftLinear, use: str) -> None:
    """The output is computed with the parameters of the call, after ``functional_call`` has restored the others."""
    norm, x = nn.LayerNorm(24), inputs()
    assert fuse_producer(norm)
    weight = torch.randn(24, requires_grad=True)
    a = torch.func.functional_call(norm, {"weight": weight}, (x,))
    assert isinstance(a, ProducerOutput)
    results = []
    for output in (a, F.layer_norm(x, (24,), weight, norm.bias, norm.eps)):
        y = layer(output if use == "layer" else output * 1 if use == "value" else Square.apply(output))
        leaves = [x, weight, norm.weight, norm.bias]
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves, materialize_grads=True)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_a_parameter_changed_before_the_use(layer: EfftLinear) -> None:
    norm = nn.LayerNorm(24)
    assert fuse_producer(norm)
    a = norm(inputs())
    with torch.no_grad():
        norm.weight += 1
    for use in (layer, torch.sin):
        with pytest.raises(RuntimeError, match="a parameter of a LayerNorm was changed in place before its output"):
            use(a)


class Doubled(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Cube(nn.GELU):
    def forward(self, x: Tensor) -> Tensor:
        return x**3


def test_a_class_that_changes_later(module: nn.Module, layer: EfftLinear) -> None:
    x = inputs()
    module.__class__ = Doubled if isinstance(module, nn.LayerNorm) else Cube
    assert torch.equal(layer(module(x)), layer(plain(module, x)))


def test_an_input_passed_by_its_name(module: nn.Module, layer: EfftLinear) -> None:
    x = inputs()
    assert torch.equal(layer(module(input=x)), layer(plain(module, x)))


def test_an_output_in_inference_mode(module: nn.Module, layer: EfftLinear) -> None:
    """The input is an ordinary tensor, but values that are computed from it are inference tensors."""
    x = inputs().detach()
    with torch.inference_mode():
        a, usual = module(x), plain(module, x)
        assert isinstance(a, ProducerOutput)
        torch.testing.assert_close(layer(a), layer(usual), rtol=1e-4, atol=1e-4)
        assert torch.equal(a + 1, usual + 1)
        a[:, 0].mul_(2)
        usual[:, 0].mul_(2)
        assert torch.equal(a + 1, usual + 1)
        torch.testing.assert_close(layer(a), layer(usual), rtol=1e-4, atol=1e-4)


def test_an_output_changed_in_place_through_two_views(module: nn.Module, layer: EfftLinear) -> None:
    a = module(inputs())
    first, second = a[:, :3], a[:, 3:]
    first.mul_(2)
    layer(a)
    second.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place through several views; change a copy"):
        layer(a)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gy


@pytest.mark.parametrize("way", ["function", "checkpoint", "reentrant checkpoint"])
def test_a_function_that_autograd_knows_nothing_of(module: nn.Module, way: str) -> None:
    """The user of the producer's output bypasses torch's Python functions. The gradient must still reach the input."""

    def use(a: Tensor) -> Tensor:
        if way == "function":
            return Square.apply(a)
        return checkpoint(lambda a: (a * a).sin(), a, use_reentrant=way.startswith("reentrant"))

    x, twin = inputs(), inputs()
    twin.data.copy_(x)
    a = module(x)
    assert isinstance(a, ProducerOutput)
    use(a).sum().backward()
    use(plain(module, twin)).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)


def test_an_input_changed_before_its_use(module: nn.Module, layer: EfftLinear) -> None:
    x = inputs().detach()
    a = module(x)
    x += 1
    for use in (layer, torch.sin):
        with pytest.raises(RuntimeError, match="was changed in place before its output was used"):
            use(a)


def test_where_somebody_needs_the_value(module: nn.Module) -> None:
    x = inputs()
    with torch.inference_mode():
        assert type(module(x * 1)) is Tensor
    seen: list[Tensor] = []
    handles = [module.register_full_backward_hook(lambda m, gx, gy: seen.extend(gx))]
    module(x).sum().backward()
    assert torch.equal(seen[0], x.grad)
    handles += [module.register_forward_hook(lambda m, args, y: seen.append(y))]
    module(x)
    assert type(seen[-1]) is Tensor
    for handle in handles:
        handle.remove()
    assert isinstance(module(x), ProducerOutput)
    traced = torch.jit.trace(module, (x,), check_trace=False)
    assert torch.equal(traced(x), plain(module, x))


def test_what_changes_nothing_passes_it_on(module: nn.Module, layer: EfftLinear) -> None:
    x = inputs()
    between = nn.Sequential(module, nn.Identity(), nn.Dropout(0.0))
    assert isinstance(between(x), ProducerOutput)
    between[2].p = 0.5
    assert not isinstance(between(x), ProducerOutput), "the value is computed, then dropped"
    assert isinstance(between.eval()(x), ProducerOutput)
    assert torch.equal(layer(between(x)), layer(module(x)))


def test_autocast(module: nn.Module, layer: EfftLinear) -> None:
    x = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        got, usual = layer(module(x)), layer(plain(module, x))
    wide = copy.deepcopy(layer).double()
    wide.weight.data, wide.bias.data = (t.bfloat16().double() for t in (layer.weight, layer.bias))
    assert_close_budget(got, wide(plain(copy.deepcopy(module).double(), x.double())), usual)


@pytest.mark.parametrize("frozen", ["nothing", "input", "weight", "bias"])
@pytest.mark.parametrize("use", ["layer", "layers", "function", "value"])
def test_a_norm_and_a_bias_that_are_trained(layer: EfftLinear, use: str, frozen: str) -> None:
    """The parameters get correct gradients for every kind of use of the norm's output."""
    norm, x = nn.LayerNorm(24), inputs()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    assert fuse_producer(norm)
    layer.bias.requires_grad_()
    {"input": x, "weight": norm.weight, "bias": norm.bias}.get(frozen, torch.empty(0)).requires_grad_(False)
    leaves = [t for t in (x, layer.bias, *norm.parameters(), *layer.factors.parameters()) if t.requires_grad]

    def output(a: Tensor) -> Tensor:
        return {
            "layer": layer,
            "layers": lambda a: layer(a) + layer(2 * a) + layer(a),
            "function": lambda a: layer(Square.apply(a)),
            "value": lambda a: layer(a + 1),
        }[use](a)

    a = norm(x)
    assert isinstance(a, ProducerOutput)
    grads = [torch.autograd.grad(output(of).sin().sum(), leaves) for of in (a, plain(norm, x))]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_a_second_derivative_by_the_parameters_of_a_norm() -> None:
    norm = nn.LayerNorm(24).double()
    assert fuse_producer(norm)
    x = inputs(dtype=torch.float64)
    results = []
    for a in (norm(x), plain(norm, x)):
        (grad,) = torch.autograd.grad(Square.apply(Square.apply(a)).sum(), norm.weight, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), [x, *norm.parameters()]))
    torch.testing.assert_close(*results)


def test_a_base_weight_that_is_trained(module: nn.Module, layer: EfftLinear) -> None:
    layer.weight.requires_grad_()
    x = inputs()
    layer(module(x)).sum().backward()
    got, layer.weight.grad = layer.weight.grad, None
    layer(plain(module, x)).sum().backward()
    torch.testing.assert_close(got, layer.weight.grad)


def test_what_cannot_hand_on() -> None:
    for other in (nn.ReLU(), nn.LayerNorm((4, 24)), nn.Linear(2, 2)):
        assert not fuse_producer(other)
        assert "forward" not in other.__dict__
    norm = nn.LayerNorm(3)
    norm.forward = lambda x: x
    assert not fuse_producer(norm)
    unfuse_producer(norm)
    assert norm.forward(7) == 7


def test_undone_copied_and_pickled(module: nn.Module) -> None:
    x = inputs()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        a = twin(x)
        assert isinstance(a, ProducerOutput)
        assert a.module is twin
    assert not fuse_producer(module), "the module is fused already"
    unfuse_producer(module)
    assert type(module(x)) is Tensor
    assert "forward" not in module.__dict__


def test_compiled(module: nn.Module, layer: EfftLinear) -> None:
    x = inputs()
    model = nn.Sequential(module, layer)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(plain(module, x)))
