"""Test that evaluations reuse the operands (D, G) of an earlier evaluation, but not after the factors change.

An evaluation is a forward pass in eval mode without gradients. The operands D and G are the two thin matrices whose
product is the update of a layer. A bank, the module that holds the factors of many layers, composes them from its
factors. Other tests check that training, traced code, copies and distributed processes do not reuse operands.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from efft_kernels import Backend, EfftLinear, Site, TTFactors, use_backend

D_IN, D_OUT, RANK = 6, 4, 3
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


class Pair(nn.Module):
    """Run two adapted layers that share a bank, and prepare and release the bank as a model does."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bank = TTFactors(D_IN, D_OUT, RANK, n_layers=2, scale=0.7, dtype=torch.float64, **settings)
        for factor in self.bank.parameters():
            nn.init.normal_(factor, std=0.5)
        layers = (nn.Linear(D_IN, D_OUT, dtype=torch.float64) for _ in range(2))
        self.layers = nn.ModuleList(EfftLinear(layer, self.bank, Site(i)) for i, layer in enumerate(layers))

    def forward(self, x: Tensor) -> Tensor:
        self.bank.prepare()
        try:
            return torch.stack([layer(x) for layer in self.layers])
        finally:
            self.bank.release()

    def expected(self, x: Tensor) -> Tensor:
        """Return the output by the dense formula, from the values that the factors have now."""
        with torch.no_grad():
            U, C, V = (factor.detach().clone() for factor in (self.bank.U, self.bank.C, self.bank.V))
            s = float(self.bank.scale)
            base = [F.linear(x, layer.weight, layer.bias) for layer in self.layers]
            return torch.stack([y + s * (x @ U @ C[i, 0] @ V) for i, y in enumerate(base)])


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of sites of every composition."""
    calls: list[int] = []
    compose = TTFactors.compose

    def noted(self: TTFactors, sites: list[Site]) -> Any:
        calls.append(len(sites))
        return compose(self, sites)

    monkeypatch.setattr(TTFactors, "compose", noted)
    return calls


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Callable[[], AbstractContextManager[None]]:
    return MODES[request.param]


def evaluate(model: Pair, x: Tensor, mode: Callable[[], AbstractContextManager[None]] = torch.no_grad) -> Tensor:
    with mode():
        return model(x).clone()


def test_a_second_evaluation_composes_nothing(x: Tensor, composed: list[int], mode: Any) -> None:
    model = Pair().eval()
    first = evaluate(model, x, mode)
    assert torch.equal(evaluate(model, x, mode), first)
    assert composed == [2]
    torch.testing.assert_close(first, model.expected(x))


def _step(make: Callable[..., torch.optim.Optimizer], **settings: Any) -> Callable[[Pair], None]:
    def change(model: Pair) -> None:
        for factor in model.bank.parameters():
            factor.grad = torch.ones_like(factor)
        make(model.bank.parameters(), lr=0.1, **settings).step()

    return change


def _in_place(model: Pair) -> None:
    with torch.no_grad():
        model.bank.C.mul_(2)


def _data_once(model: Pair) -> None:
    model.bank.V.data = model.bank.V.data * 2


def _data_twice(model: Pair) -> None:
    """Replace the memory twice, so that the last tensor may get the address of the original one."""
    for factor in model.bank.parameters():
        factor.data = factor.data + 1
        factor.data = factor.data + 1


def _through_data(model: Pair) -> None:
    model.bank.U.data.add_(1)


def _through_numpy(model: Pair) -> None:
    model.bank.U.detach().numpy()[:] += 1


def _load(assign: bool) -> Callable[[Pair], None]:
    def change(model: Pair) -> None:
        state = {name: value * 2 for name, value in model.bank.state_dict().items()}
        model.bank.load_state_dict(state, assign=assign)

    return change


def _new_parameter(model: Pair) -> None:
    model.bank.C = nn.Parameter(model.bank.C.detach() * 2)


def _other_rank(model: Pair) -> None:
    bank = model.bank
    bank.replace(torch.randn(D_IN, 2), torch.randn(2, 1, 2, 2), torch.randn(2, D_OUT))


def _scale(model: Pair) -> None:
    model.bank.initial_scale *= 2


def _swapped(model: Pair) -> None:
    torch.utils.swap_tensors(model.bank.U, nn.Parameter(model.bank.U.detach() * 2))


def _to_and_back(model: Pair) -> None:
    model.bank.to(torch.bfloat16).to(torch.float64)  # rounds the factors


CHANGES: dict[str, Callable[[Pair], None]] = {
    "SGD": _step(torch.optim.SGD),
    "Adam": _step(torch.optim.Adam),
    "Adam, foreach": _step(torch.optim.Adam, foreach=True),
    "AdamW, fused": _step(torch.optim.AdamW, fused=True),
    "in place": _in_place,
    "new data": _data_once,
    "new data twice": _data_twice,
    "through data": _through_data,
    "through numpy": _through_numpy,
    "load_state_dict": _load(assign=False),
    "load_state_dict, assign": _load(assign=True),
    "new parameter": _new_parameter,
    "new ranks": _other_rank,
    "scale": _scale,
    "swap_tensors": _swapped,
    "to another dtype and back": _to_and_back,
    "reset": lambda model: model.bank.reset_parameters(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen_by_the_next_evaluation(x: Tensor, change: Callable[[Pair], None], mode: Any) -> None:
    model = Pair().eval()
    before = evaluate(model, x, mode)
    change(model)
    expected = model.expected(x)
    assert not torch.allclose(expected, before), "the change changes the output"
    torch.testing.assert_close(evaluate(model, x, mode), expected)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen_by_a_layer_that_is_called_alone(x: Tensor, change: Callable[[Pair], None], mode: Any) -> None:
    model = Pair().eval()
    evaluate(model, x, mode)
    change(model)
    with mode():
        torch.testing.assert_close(model.layers[1](x), model.expected(x)[1])


def test_the_trained_scale_of_another_bank(x: Tensor) -> None:
    leader = TTFactors(D_IN, D_OUT, RANK, scale=0.7, trainable_scale=True, dtype=torch.float64)
    model = Pair().eval()
    model.bank.follow_scale(leader)
    before = evaluate(model, x)
    with torch.no_grad():
        leader.log_scale.fill_(1.0)
    expected = model.expected(x)
    assert not torch.allclose(expected, before)
    torch.testing.assert_close(evaluate(model, x), expected)


def test_a_layer_with_its_own_bank(x: Tensor, composed: list[int], mode: Any) -> None:
    linear = nn.Linear(D_IN, D_OUT, dtype=torch.float64)
    layer = EfftLinear.from_linear(linear, rank=RANK, init="u").eval()
    with mode():
        first = layer(x).clone()
        assert torch.equal(layer(x), first)
    assert composed == [1]
    nn.init.normal_(layer.factors.U)
    U, C, V = layer.factors.U, layer.factors.C[0, 0], layer.factors.V
    with mode():
        torch.testing.assert_close(layer(x), F.linear(x, linear.weight, linear.bias) + x @ U @ C @ V)


def test_parameters_that_a_call_passes(x: Tensor) -> None:
    model = Pair().eval()
    evaluate(model, x)
    doubled = {"bank.C": 2 * model.bank.C.detach()}
    with torch.no_grad():
        got = functional_call(model, doubled, x)
    _in_place(model)
    torch.testing.assert_close(got, model.expected(x))
    torch.testing.assert_close(evaluate(model, x), model.expected(x))


def test_training_follows_an_evaluation(x: Tensor, mode: Any) -> None:
    """Training composes new operands, because tensors of ``inference_mode`` cannot be saved for a backward pass."""
    model = Pair().eval()
    evaluate(model, x, mode)
    loss = model(x).square().sum()
    grads = torch.autograd.grad(loss, list(model.bank.parameters()))
    fresh = Pair().eval()
    expected = torch.autograd.grad(fresh(x).square().sum(), list(fresh.bank.parameters()))
    torch.testing.assert_close(grads, expected)


def test_a_layer_with_a_graph_inside_an_evaluation(x: Tensor) -> None:
    """A pass under no_grad may have a part that records a graph, for the gradient of an input."""
    model = Pair().eval()
    evaluate(model, x, torch.inference_mode)
    x = x.clone().requires_grad_()
    with torch.no_grad():
        model.bank.prepare()
        with torch.enable_grad():
            y = model.layers[0](x)
        model.bank.release()
    (dx,) = torch.autograd.grad(y.sum(), x)
    W = model.layers[0].weight + model.layers[0].delta_weight()
    torch.testing.assert_close(dx, W.sum(0).expand_as(dx))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_training_mode_composes_in_every_pass(x: Tensor, composed: list[int], dropout: float) -> None:
    model = Pair(dropout=dropout).train()
    first, second = (evaluate(model, x) for _ in range(2))
    assert composed == [2, 2]
    assert torch.equal(first, second) == (dropout == 0)


def test_passes_with_a_graph_compose_in_every_pass(x: Tensor, composed: list[int]) -> None:
    model = Pair().eval()
    for _ in range(2):
        model(x).sum().backward()
    assert composed == [2, 2]


def test_a_pass_with_a_graph_discards_the_operands(x: Tensor, composed: list[int]) -> None:
    """After a pass with a graph, an optimizer may change the factors in a way that torch does not record."""
    model = Pair().eval()
    evaluate(model, x)
    model(x)
    assert model.bank._evaluated is None
    evaluate(model, x)
    assert composed == [2, 2, 2]


@pytest.mark.parametrize(
    "free", [lambda m: m.train(), lambda m: m.eval(), lambda m: m.float(), lambda m: m.bank.forget()]
)
def test_operands_are_freed(x: Tensor, free: Callable[[Pair], None]) -> None:
    model = Pair().eval()
    evaluate(model, x)
    assert model.bank._evaluated is not None
    free(model)
    assert model.bank._evaluated is None


def test_merging_frees_the_operands(x: Tensor) -> None:
    model = Pair().eval()
    expected = evaluate(model, x)
    for layer in model.layers:
        layer.merge()
    assert model.bank._evaluated is None
    torch.testing.assert_close(evaluate(model, x), expected)
    for layer in model.layers:
        layer.unmerge()
    _in_place(model)
    torch.testing.assert_close(evaluate(model, x), model.expected(x))


def _unpickled(model: Pair) -> Pair:
    return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]


@pytest.mark.parametrize("clone", [copy.deepcopy, _unpickled])
def test_copies_have_their_own_operands(x: Tensor, clone: Callable[[Pair], Pair]) -> None:
    model = Pair().eval()
    before = evaluate(model, x)
    twin = clone(model)
    assert twin.bank._evaluated is None
    _in_place(twin)
    torch.testing.assert_close(evaluate(twin, x), twin.expected(x))
    assert torch.equal(evaluate(model, x), before)


def test_another_backend_composes_again(x: Tensor, composed: list[int]) -> None:
    model = Pair().eval()
    evaluate(model, x)
    with use_backend(Backend.REFERENCE):
        evaluate(model, x)
    assert composed == [2, 2]


class Doubled(TTFactors):
    """Multiply the operands G of the base class by a factor that the base class does not know."""

    factor = 2.0

    def compose(self, sites: Any) -> Any:
        return [(D, self.factor * G) for D, G in super().compose(sites)]


def test_a_class_that_does_not_state_its_settings_composes_in_every_pass(x: Tensor) -> None:
    bank = Doubled(D_IN, D_OUT, RANK, dtype=torch.float64, init="u")
    nn.init.normal_(bank.U)
    layer = EfftLinear(nn.Linear(D_IN, D_OUT, dtype=torch.float64), bank, Site()).eval()
    with torch.no_grad():
        base = F.linear(x, layer.weight, layer.bias)
        once = layer(x) - base
        bank.factor = 4.0
        torch.testing.assert_close(layer(x) - base, 2 * once)


def test_processes_that_work_together_compose_in_every_pass(
    x: Tensor, composed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Pair().eval()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for _ in range(2):
        evaluate(model, x)
    assert composed == [2, 2]


def _jit(model: Pair, x: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.jit.trace(model, x, check_trace=False)  # type: ignore[no-any-return]


def _compiled(model: Pair, x: Tensor) -> Callable[[Tensor], Tensor]:
    torch.compiler.reset()
    return torch.compile(model, backend="eager", fullgraph=True)  # type: ignore[no-any-return]


def _exported(model: Pair, x: Tensor) -> Callable[[Tensor], Tensor]:
    program = torch.export.export(model, (x,))

    def run(x: Tensor) -> Tensor:
        state = {name: model.get_parameter(name) for name in program.state_dict}
        return functional_call(program.module(), state, x)

    return run


@pytest.mark.parametrize("prepare", [_jit, _compiled, _exported], ids=["jit", "compile", "export"])
def test_traced_code_reads_the_factors(x: Tensor, prepare: Callable[..., Callable[[Tensor], Tensor]]) -> None:
    """Code that was traced after an evaluation must not contain the operands as constants."""
    model = Pair().eval()
    with torch.no_grad():
        model(x)
        run = prepare(model, x)
        run(x)
        _in_place(model)
        torch.testing.assert_close(run(x), model.expected(x))


def test_make_fx_traces_the_composition(x: Tensor) -> None:
    model = Pair().eval()
    with torch.no_grad():
        model(x)
        graph = make_fx(lambda C: functional_call(model, {"bank.C": C}, x))(model.bank.C.detach())
        _in_place(model)
        torch.testing.assert_close(graph(model.bank.C.detach()), model.expected(x))


@pytest.mark.gpu
def test_a_captured_graph_composes_again(x: Tensor) -> None:
    model, x = Pair().eval().float().cuda(), x.float().cuda()
    with torch.no_grad():
        for _ in range(2):
            model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        model.bank.C.mul_(2)
        graph.replay()
        torch.testing.assert_close(y, model.expected(x))


@pytest.mark.gpu
def test_another_stream_composes_again(x: Tensor, composed: list[int]) -> None:
    model, x = Pair().eval().float().cuda(), x.float().cuda()
    evaluate(model, x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = evaluate(model, x)
    stream.synchronize()
    assert composed == [2, 2]
    torch.testing.assert_close(y, model.expected(x))
