"""Test modules whose MLP is computed by the op ``tt_mlp``.

``fuse_mlp`` changes the module that calls the layers of the MLP. In every situation in which a submodule does more than
the op computes, the module must call its submodules as usual.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from efft_kernels import EfftLinear
from efft_kernels.nn import mlp
from efft_kernels.nn.mlp import fuse_mlp, unfuse_mlp
from efft_kernels.nn.producers import fuse_producer, unfuse_producer
from efft_kernels.testing import assert_close_budget


class Mlp(nn.Module):
    """An MLP with a dropout and an identity between the layers, like that of timm."""

    def __init__(self, act: nn.Module | None = None, drop: float = 0.0, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(24, 40)
        self.act = act or nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.norm = norm or nn.Identity()
        self.fc2 = nn.Linear(40, 16)
        self.drop2 = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = self.act(x)
        x = self.drop1(x)
        x = self.norm(x)
        x = self.fc2(x)
        return self.drop2(x)


def sequence() -> nn.Module:
    return nn.Sequential(nn.Identity(), nn.Linear(24, 40), nn.GELU("tanh"), nn.Linear(40, 16), nn.ReLU())


MAKERS: dict[str, Callable[[], nn.Module]] = {"module": Mlp, "sequence": sequence}


def adapted(model: nn.Module) -> nn.Module:
    """Adapt all linear layers, fuse all GELUs and LayerNorms, and convert the model to fp64."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            new = EfftLinear.from_linear(layer, rank=5)
            nn.init.normal_(new.factors.V)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, new)
    for module in model.modules():
        fuse_producer(module)
    return model.double()


@pytest.fixture(params=MAKERS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    model = adapted(nn.Sequential(nn.LayerNorm(24), MAKERS[request.param]()))
    for parameter in model[0].parameters():
        nn.init.normal_(parameter)
    assert fuse_mlp(model[1])
    return model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Return a list to which every call of the op appends its keyword arguments."""
    found: list[Any] = []
    op = mlp.tt_mlp

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        found.append(kwargs)
        return op(*args, **kwargs)

    monkeypatch.setattr(mlp, "tt_mlp", noted)
    return found


def plain(model: nn.Module) -> nn.Module:
    """Return a copy of the model with no fused module."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        unfuse_mlp(module)
        unfuse_producer(module)
    assert not any("forward" in module.__dict__ for module in twin.modules())
    return twin


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (3 * torch.randn(2, 7, 24, generator=generator) + 1).to(dtype).requires_grad_()


def upstream(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the output and the gradients of x and of all trained parameters."""
    y = model(x)
    leaves = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    return [y, *torch.autograd.grad(y, leaves, upstream(y), materialize_grads=True)]


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    owned = {tensor.untyped_storage().data_ptr() for tensor in (x, *model.parameters())}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(n for n, _ in kept.values())


def test_the_same_values_and_gradients(model: nn.Module, calls: list[Any]) -> None:
    twin, x = plain(model.float()), inputs(torch.float32)
    got, usual = step(model, x), step(twin, x)
    exact = step(copy.deepcopy(twin).double(), inputs())
    assert len(calls) == 1
    assert calls[0]["gamma"] is model[0].weight
    for one, formula, peer in zip(got, exact, usual, strict=True):
        assert_close_budget(one, formula, peer)
    assert saved_bytes(model, x) < saved_bytes(twin, x)


def test_not_more_bytes_than_two_fused_layers(model: nn.Module) -> None:
    layers = copy.deepcopy(model)
    unfuse_mlp(layers[1])
    assert saved_bytes(model, inputs()) <= saved_bytes(layers, inputs())


def test_without_a_norm(model: nn.Module, calls: list[Any]) -> None:
    x = inputs()
    got, expected = step(model[1], x), step(plain(model)[1], x)
    assert len(calls) == 1
    assert "eps" not in calls[0]
    torch.testing.assert_close(got, expected)


class UsesTwice(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        z = self.fc1(x)
        return self.fc2(self.act(z)) + z.mean()


class Gated(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)) * self.drop1(x).mean())


class Repeats(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.act(self.fc1(x))))


class ReadsItsMode(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.training:
            x = x * 2
        return self.fc2(self.act(x))


class Counts(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = 1
        return self.fc2(self.act(self.fc1(x)))


class Adds(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x) + 1))


class TakesMore(Mlp):
    def forward(self, x: Tensor, scale: float) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class ReturnsAnother(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        z = self.fc1(x)
        self.fc2(self.act(z))
        return z


class InFp32(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.fc2(self.act(self.fc1(x)))


class WithoutGradient(Mlp):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class HasAnInnerFunction(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        with (lambda: torch.enable_grad())():
            return self.fc2(self.act(self.fc1(x)))


class Inherits(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Branches(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        if not x:
            x = self.drop1(x)
        return self.fc2(self.act(self.fc1(x)))


class HasAContextAsDefault(Mlp):
    def forward(self, x: Tensor, context: Any = torch.no_grad()) -> Tensor:  # noqa: B008
        with context:
            return self.fc2(self.act(self.fc1(x)))


class Backwards(nn.Sequential):
    """Calls its modules in the reverse order."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(40, 24), nn.GELU(), nn.Linear(24, 40))

    def __iter__(self) -> Iterator[nn.Module]:
        return reversed(self._modules.values())


REFUSED = (
    *(UsesTwice, Gated, Repeats, ReadsItsMode, Counts, Adds, TakesMore, ReturnsAnother),
    *(InFp32, WithoutGradient, HasAnInnerFunction, Inherits, Branches, HasAContextAsDefault, Backwards),
)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_module_that_does_anything_else_is_refused(kind: type[nn.Module]) -> None:
    module = adapted(kind())
    assert not fuse_mlp(module)
    assert "forward" not in module.__dict__


@pytest.mark.parametrize(
    "module",
    [
        Mlp(act=nn.ReLU()),
        Mlp(norm=nn.LayerNorm(40)),
        nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.GELU(), nn.Linear(40, 16)),
        nn.Sequential(nn.Linear(24, 16), nn.GELU()),
        nn.ModuleList([nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 16)]),
    ],
)
def test_other_modules_between_the_layers(module: nn.Module) -> None:
    assert not fuse_mlp(adapted(module))


def test_layers_that_are_not_adapted_or_a_gelu_that_is_not_fused() -> None:
    assert not fuse_mlp(Mlp())
    module = adapted(Mlp())
    unfuse_producer(module.act)
    assert not fuse_mlp(module)


def add_hook(model: nn.Module, name: str, kind: str) -> list[Any]:
    """Register a hook on a submodule of the MLP, and return the list of tensors that it gets."""
    seen: list[Any] = []
    module = model[1].get_submodule(name)
    if kind == "forward":
        module.register_forward_hook(lambda module, args, output: seen.append(output + 0))
    elif kind == "forward_pre":
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0] + 0))
    else:
        module.register_full_backward_hook(lambda module, gx, gy: seen.append(gy[0] + 0))
    return seen


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "backward"])
@pytest.mark.parametrize("name", ["fc1", "act", "drop1", "norm", "fc2"])
def test_hooks_see_ordinary_values(name: str, kind: str, calls: list[Any]) -> None:
    model = adapted(nn.Sequential(nn.LayerNorm(24), Mlp()))
    assert fuse_mlp(model[1])
    twin, x = plain(model), inputs()
    seen, expected = add_hook(model, name, kind), add_hook(twin, name, kind)
    torch.testing.assert_close(step(model, x), step(twin, x))
    assert not calls
    assert len(seen) == len(expected) == 1
    torch.testing.assert_close(seen, expected)


def test_hooks_on_all_modules(model: nn.Module, calls: list[Any]) -> None:
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        model(inputs())
    finally:
        handle.remove()
    assert seen.count("EfftLinear") == 2
    assert not calls
    model(inputs())
    assert len(calls) == 1


def disable(model: nn.Module) -> None:
    model[1].fc1.enabled = False


def merge(model: nn.Module) -> None:
    model[1].fc2.merge()


def train_a_base_weight(model: nn.Module) -> None:
    model[1].fc2.weight.requires_grad_()


def replace_a_layer(model: nn.Module) -> None:
    model[1].fc1 = nn.Linear(24, 40).double()


def replace_the_gelu(model: nn.Module) -> None:
    model[1].act = nn.Tanh()


def replace_an_identity(model: nn.Module) -> None:
    model[1].norm = nn.LayerNorm(40).double()


def set_a_forward(model: nn.Module) -> None:
    layer = model[1].fc1
    layer.forward = lambda x: 2 * EfftLinear.forward(layer, x)


class Doubled(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.fc2(self.act(self.fc1(x)))


class Softened(nn.GELU):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def change_the_class(model: nn.Module) -> None:
    model[1].__class__ = Doubled


def change_the_class_of_the_gelu(model: nn.Module) -> None:
    model[1].act.__class__ = Softened


class CalledTwice(nn.GELU):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


def change_the_call_of_the_gelu(model: nn.Module) -> None:
    model[1].act.__class__ = CalledTwice


CHANGES = (
    change_the_call_of_the_gelu,
    *(change_the_class, change_the_class_of_the_gelu),
    *(disable, merge, train_a_base_weight),
    *(replace_a_layer, replace_the_gelu, replace_an_identity, set_a_forward),
)


@pytest.mark.parametrize("change", CHANGES)
def test_submodules_that_change_later(change: Callable[[nn.Module], None], calls: list[Any]) -> None:
    model = adapted(nn.Sequential(nn.LayerNorm(24), Mlp()))
    assert fuse_mlp(model[1])
    twin = plain(model)
    for one in (model, twin):
        torch.manual_seed(0)
        change(one)
    torch.testing.assert_close(step(model, inputs()), step(twin, inputs()))
    assert not calls


def test_a_sequence_that_grows_later(calls: list[Any]) -> None:
    model = adapted(sequence())
    assert fuse_mlp(model)
    model.append(nn.Tanh())
    twin = plain(model)
    torch.testing.assert_close(step(model, inputs()), step(twin, inputs()))
    assert not calls


def test_a_dropout_that_drops(calls: list[Any]) -> None:
    model = adapted(Mlp(drop=0.5))
    assert fuse_mlp(model)
    twin = plain(model)
    for one in (model, twin):
        torch.manual_seed(0)
        one(inputs())
    torch.manual_seed(0)
    got = model(inputs())
    torch.manual_seed(0)
    torch.testing.assert_close(got, twin(inputs()))
    assert not calls
    torch.testing.assert_close(model.eval()(inputs()), twin.eval()(inputs()))
    assert len(calls) == 1


def test_several_mlps_in_one_sequence(calls: list[Any]) -> None:
    layers = [nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 24)]
    model = adapted(nn.Sequential(*layers))
    assert fuse_mlp(model)
    torch.testing.assert_close(step(model, inputs()), step(plain(model), inputs()))
    assert len(calls) == 1


def test_trained_biases_and_norms(model: nn.Module, calls: list[Any]) -> None:
    for module in model.modules():
        if isinstance(module, (EfftLinear, nn.LayerNorm)):
            module.bias.requires_grad_()
    model[0].weight.requires_grad_()
    twin = plain(model)
    torch.testing.assert_close(step(model, inputs()), step(twin, inputs()))
    assert len(calls) == 1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_checkpointing(model: nn.Module, use_reentrant: bool, calls: list[Any]) -> None:
    expected = step(plain(model), inputs())
    x = inputs()
    y = checkpoint(model, x, use_reentrant=use_reentrant)
    y.backward(upstream(y))
    grads = [x.grad, *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)]
    torch.testing.assert_close(grads, expected[1:])
    assert len(calls) == 2


def test_a_checkpoint_that_begins_after_the_norm(model: nn.Module) -> None:
    expected = step(plain(model), inputs())
    x = inputs()
    y = checkpoint(model[1], model[0](x), use_reentrant=False)
    y.backward(upstream(y))
    torch.testing.assert_close(x.grad, expected[1])


def test_a_norm_whose_output_was_changed_in_place(model: nn.Module, calls: list[Any]) -> None:
    results = []
    for one in (model, plain(model)):
        x = inputs()
        n = one[0](x)
        n.mul_(2)
        results.append(torch.autograd.grad(one[1](n).sin().sum(), x))
    torch.testing.assert_close(*results)
    assert "eps" not in calls[0]


def test_a_norm_whose_input_was_changed_in_place(model: nn.Module) -> None:
    x = inputs().detach()
    n = model[0](x)
    x += 1
    with pytest.raises(RuntimeError, match="was changed in place before its output was used"):
        model[1](n)


def test_a_gelu_before_the_mlp(model: nn.Module, calls: list[Any]) -> None:
    gelu = nn.GELU()
    assert fuse_producer(gelu)
    torch.testing.assert_close(model[1](gelu(inputs())), plain(model)[1](F.gelu(inputs())))
    assert not calls


def test_autocast(model: nn.Module, calls: list[Any]) -> None:
    model.float()
    x = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, usual = step(model, x), step(plain(model), x)
    assert len(calls) == 1
    wide = plain(model).double()
    for name, parameter in wide.named_parameters():
        if "factors" not in name and not name.startswith("0"):
            parameter.data = parameter.data.bfloat16().double()
    exact = step(wide, inputs())
    for one, formula, peer in zip(got, exact, usual, strict=True):
        assert_close_budget(one, formula, peer)


def test_derivatives_of_second_order(model: nn.Module) -> None:
    results = []
    for one in (model, plain(model)):
        x = inputs()
        (grad,) = torch.autograd.grad(one(x).sin().sum(), x, create_graph=True)
        leaves = [x, *(parameter for parameter in one.parameters() if parameter.requires_grad)]
        results.append(torch.autograd.grad(grad.square().sum(), leaves))
    torch.testing.assert_close(*results)


def test_functional_transforms(model: nn.Module) -> None:
    for of in (torch.func.grad, torch.func.vmap):
        results = []
        for one in (model, plain(model)):
            function = (lambda x, one=one: one(x).sin().sum()) if of is torch.func.grad else one
            results.append(of(function)(inputs().detach()))
        torch.testing.assert_close(*results)


def test_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        x = inputs() * 1
        torch.testing.assert_close(model(x), plain(model)(x))


def test_compiled_and_traced(model: nn.Module, calls: list[Any]) -> None:
    x = inputs()
    expected = plain(model)(x)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    traced = torch.jit.trace(model, (x,), check_trace=False)
    torch.testing.assert_close(traced(x), expected)
    assert not calls


def test_undone_copied_and_pickled(model: nn.Module, calls: list[Any]) -> None:
    x = inputs()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            twin[0].bias.add_(1)
            twin[1](x.detach())  # without a norm
        assert len(calls) == 1
        twin(x)
        assert calls[1]["beta"] is twin[0].bias
        calls.clear()
    assert not fuse_mlp(model[1]), "the module is fused already"
    unfuse_mlp(model[1])
    assert "forward" not in model[1].__dict__
    model[1].forward = lambda x: x
    assert not fuse_mlp(model[1])
    unfuse_mlp(model[1])
    assert model[1].forward(7) == 7
