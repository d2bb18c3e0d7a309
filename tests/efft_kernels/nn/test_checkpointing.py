"""Test activation checkpointing: a layer that runs again in backward must get the factors of its own forward pass.

A *bank* is the module that holds the factors of many layers. A *pass* is a forward pass from ``bank.prepare()`` to
``bank.release()``. A *region* is the code that one call of ``checkpoint`` runs again.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from efft_kernels import EfftLinear


def recompute(layer: EfftLinear, x: Tensor) -> Tensor:
    return checkpoint(layer, x, use_reentrant=False)


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("prepare", [True, False], ids=["prepared", "one by one"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_same_as_plain(make_stack: Callable[..., Any], kind: str, dropout: float, prepare: bool) -> None:
    """Losses and all gradients exactly equal those without checkpointing, for two seeds of the dropout masks."""
    stack = make_stack(kind, dropout=dropout, trainable_scale=True)
    stack.prepare = prepare
    for seed in (0, 1):
        assert_same(stack.gradients(recompute, seed), stack.gradients(seed=seed))


@pytest.mark.parametrize("frozen", ["U", "C", "V", "CV", "UC", "UCV"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_frozen_factors(make_stack: Callable[..., Any], kind: str, dropout: float, frozen: str) -> None:
    stack = make_stack(kind, dropout=dropout)
    for name in frozen:
        getattr(stack.bank, name).requires_grad_(False)
    got, expected = stack.gradients(recompute), stack.gradients()
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_eval_mode_is_recomputed_too(make_stack: Callable[..., Any]) -> None:
    stack = make_stack("mlp", dropout=0.4)
    stack.eval()
    assert_same(stack.gradients(recompute), stack.gradients())


def test_backward_twice(make_stack: Callable[..., Any]) -> None:
    stack = make_stack("mlp", dropout=0.4)
    loss = stack.run(recompute)
    leaves = list(stack.bank.parameters())
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for a, b in zip(torch.autograd.grad(loss, leaves), first, strict=True):
        assert torch.equal(a, b)


def test_gradients_of_the_inputs_alone(make_stack: Callable[..., Any]) -> None:
    """A saliency map needs only the gradients of the inputs. The next pass must not treat that pass as unfinished."""
    stack = make_stack("mlp", dropout=0.4)
    for call in (recompute, lambda layer, x: layer(x)):
        torch.autograd.grad(stack.run(call), stack.inputs)
    assert_same(stack.gradients(recompute), stack.gradients())


def test_layers_that_were_not_used(make_stack: Callable[..., Any]) -> None:
    """The first pass does not call the second layer of each MLP, but must still end correctly."""
    stack = make_stack("mlp", dropout=0.4)
    stack.run(lambda layer, x: x * 0 if layer.site.transpose else recompute(layer, x)).backward()
    assert_same(stack.gradients(recompute), stack.gradients())


def test_a_part_without_gradients(make_stack: Callable[..., Any]) -> None:
    """The first block runs under ``no_grad``. The bank must not mistake this for reentrant checkpointing."""
    stack = make_stack("mlp")

    def call(again: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(layer: EfftLinear, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(layer.site.layer > 0):
                return again(layer, x)

        return run

    grads = [
        torch.autograd.grad(stack.run(call(again)), list(stack.bank.parameters()))
        for again in (recompute, lambda layer, x: layer(x))
    ]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_reentrant_checkpointing(make_stack: Callable[..., Any]) -> None:
    stack = make_stack("mlp")
    stack.run(lambda layer, x: checkpoint(layer, x, use_reentrant=True)).backward()
    expected = stack.gradients()
    for name, parameter in stack.bank.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_reentrant_checkpointing_with_dropout_is_refused(make_stack: Callable[..., Any]) -> None:
    stack = make_stack("mlp", dropout=0.4)
    loss = stack.run(lambda layer, x: checkpoint(layer, x, use_reentrant=True))
    with torch.no_grad():
        stack.run()
    with pytest.raises(RuntimeError, match=r"use_reentrant=True cannot repeat .* use .*use_reentrant=False\), or set"):
        loss.backward()
    assert_same(stack.gradients(recompute), stack.gradients())


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("order", [(0, 1), (1, 0), None], ids=["in order", "in reverse", "together"])
def test_two_passes_waiting(order: tuple[int, int] | None, dropout: float, make_stack: Callable[..., Any]) -> None:
    """A layer that runs again in backward gets the factors and the dropout masks of its own forward pass."""
    stack = make_stack("mlp", dropout=dropout)
    leaves = list(stack.bank.parameters())
    results = []
    for call in (recompute, lambda layer, x: layer(x)):
        torch.manual_seed(3)
        losses = [stack.run(call), 2 * stack.run(call)]
        parts = [sum(losses)] if order is None else [losses[i] for i in order]
        results.append([g for part in parts for g in torch.autograd.grad(part, leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_pass_that_feeds_the_next(make_stack: Callable[..., Any]) -> None:
    """Each pass gets the output of the pass before, so all three passes are in one graph."""
    stack = make_stack("mlp", dropout=0.4)
    leaves = list(stack.bank.parameters())
    results = []
    for call in (recompute, lambda layer, x: layer(x)):
        torch.manual_seed(3)
        x = stack.inputs[0]
        for _ in range(3):
            stack.bank.prepare()
            for layer in stack.layers[:2]:
                x = torch.tanh(call(layer, x))
            stack.bank.release()
        results.append(torch.autograd.grad(x.sum(), leaves))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def same_as_plain(stack: Any, forward: Callable[[Callable[..., Tensor]], Tensor]) -> None:
    """Check that ``forward(again)`` has the same gradients whether or not a layer runs again in backward."""
    leaves = [p for p in stack.bank.parameters() if p.requires_grad]
    results = []
    for again in (recompute, lambda part, *x: part(*x)):
        torch.manual_seed(3)
        results.append(torch.autograd.grad(forward(again), leaves))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_region_that_ends_far_from_its_layer(make_stack: Callable[..., Any], dropout: float) -> None:
    """The region multiplies its input by the output of its layers.

    In the graph, fewer steps lead from the output through the input to the previous pass than from the output through
    the layers to the factors of this pass.
    """
    stack = make_stack("mlp", dropout=dropout)
    up, down = stack.layers[:2]

    def region(x: Tensor) -> Tensor:
        return x * torch.sigmoid(torch.tanh(torch.relu(down(up(x)))))

    def forward(again: Callable[..., Tensor]) -> Tensor:
        x = stack.inputs[0]
        for _ in range(2):
            stack.bank.prepare()
            x = again(region, x)
            stack.bank.release()
        return x.sum()

    same_as_plain(stack, forward)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_region_with_a_branch_beside_its_layer(make_stack: Callable[..., Any], dropout: float) -> None:
    """The backward pass may reach the branch, which does not depend on the factors, before the layer."""
    stack = make_stack("mlp", dropout=dropout)

    def forward(again: Callable[..., Tensor]) -> Tensor:
        stack.bank.prepare()
        y, aside = again(lambda x: (stack.layers[0](x), torch.sigmoid(x) * x), stack.inputs[0])
        stack.bank.release()
        return y.square().sum() + aside.sum()

    same_as_plain(stack, forward)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_nested_regions(make_stack: Callable[..., Any], dropout: float) -> None:
    stack = make_stack("mlp", dropout=dropout)
    up, down = stack.layers[:2]

    def forward(again: Callable[..., Tensor]) -> Tensor:
        losses = []
        for _ in range(2):
            stack.bank.prepare()
            y = again(lambda x: torch.tanh(again(down, torch.tanh(again(up, x)))), stack.inputs[0])
            losses.append(y.square().sum())
            stack.bank.release()
        return losses[0] + 2 * losses[1]

    same_as_plain(stack, forward)


def test_a_part_called_on_the_output_of_a_pass(make_stack: Callable[..., Any]) -> None:
    stack = make_stack("mlp")
    up, down = stack.layers[:2]

    def forward(again: Callable[..., Tensor]) -> Tensor:
        stack.bank.prepare()
        y = again(down, torch.tanh(again(up, stack.inputs[0])))
        stack.bank.release()
        return again(down, torch.tanh(again(up, torch.tanh(y)))).square().sum()

    same_as_plain(stack, forward)


@pytest.mark.parametrize("frozen", [(), ("C", "V")], ids=str)
def test_reentrant_beside_plain(make_stack: Callable[..., Any], frozen: tuple[str, ...]) -> None:
    """In one pass, a layer runs without and with reentrant checkpointing. Another pass precedes the backward pass."""
    stack = make_stack("mlp")
    for name in frozen:
        getattr(stack.bank, name).requires_grad_(False)
    up, down = stack.layers[:2]
    results = []
    for again in (lambda layer, x: checkpoint(layer, x, use_reentrant=True), lambda layer, x: layer(x)):
        stack.bank.zero_grad()
        stack.bank.prepare()
        x = torch.tanh(down(torch.tanh(up(stack.inputs[0]))))
        x = torch.tanh(down(torch.tanh(again(up, x))))
        stack.bank.release()
        stack.run()
        x.sum().backward()
        results.append([p.grad.clone() for p in stack.bank.parameters() if p.requires_grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_passes_without_gradients_do_not_count(make_stack: Callable[..., Any]) -> None:
    stack = make_stack("mlp", dropout=0.4)
    loss = stack.run(recompute)
    with torch.no_grad():
        stack.run()
        stack.run()
    loss.backward()
    assert_same(stack.gradients(recompute), stack.gradients())


def test_an_abandoned_pass_does_not_block_the_next(make_stack: Callable[..., Any]) -> None:
    """The graph of a pass may be freed without a backward pass, for example after an exception."""
    stack = make_stack("mlp", dropout=0.4)
    loss = stack.run(recompute)
    del loss
    gc.collect()
    assert_same(stack.gradients(recompute), stack.gradients())


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_memory_of_passes_is_freed(make_stack: Callable[..., Any], dropout: float) -> None:
    """The memory of a pass is freed even without the garbage collector.

    No pass keeps activations alive. After passes without a backward pass, the factors of at most two passes are alive;
    after passes with a backward pass, no factors are alive.
    """
    stack = make_stack("mlp", dropout=dropout)
    gc.collect()
    gc.disable()
    try:
        activations: list[Any] = []
        factors: list[Any] = []

        def call(layer: EfftLinear, x: Tensor) -> Tensor:
            y = layer(x) * 1
            activations.append(weakref.ref(y))
            factors.append(weakref.ref(stack.bank.down_up(layer.binding)[1]))
            return y

        for _ in range(4):
            stack.run(call)
        assert not any(ref() is not None for ref in activations), "abandoned"
        assert sum(ref() is not None for ref in factors) <= 2 * len(stack.layers)
        for _ in range(4):
            stack.run(call).backward()
        assert not any(ref() is not None for ref in activations), "differentiated"
        assert not any(ref() is not None for ref in factors)
    finally:
        gc.enable()


def test_a_layer_with_factors_of_its_own() -> None:
    layer = EfftLinear.from_linear(torch.nn.Linear(6, 4, dtype=torch.float64), rank=2, dropout=0.4, init="u")
    torch.nn.init.normal_(layer.factors.U)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.factors.parameters()]
    results = []
    for call in (recompute, lambda layer, x: layer(x)):
        torch.manual_seed(0)
        results.append(torch.autograd.grad(call(layer, x).square().sum(), leaves))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_pass_of_another_bank_may_wait(make_stack: Callable[..., Any]) -> None:
    """A bank ignores the passes of other banks."""
    stack, other = make_stack("mlp", dropout=0.4), make_stack("attention", dropout=0.4)
    waiting = other.run(recompute)
    assert_same(stack.gradients(recompute), stack.gradients())
    waiting.backward()
