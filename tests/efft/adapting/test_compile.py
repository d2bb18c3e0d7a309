"""Test torch.compile: it has no graph breaks, gives the results of eager mode, and leaves the model usable by efft."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efft

pytestmark = pytest.mark.slow  # compiles complete models

Make = Callable[..., nn.Module]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def make(architecture: str, tiny_vit: Make, tiny_swin: Make, **config: Any) -> tuple[nn.Module, Tensor]:
    """Return an adapted model and its input. Swin has only 2 stages, because 4 stages would not test more."""
    if architecture == "vit":
        return efft.apply(tiny_vit(), efft.EfftConfig(rank=4, **config)), torch.randn(2, 3, 16, 16)
    model = tiny_swin(patch_size=4, depths=(2, 2), num_heads=(1, 2))
    return efft.apply(model, efft.EfftConfig(rank={"mhsa": 2, "ffn": (2, 4)}, **config)), torch.randn(2, 3, 32, 32)


def step(model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output and the gradients of all trainable parameters."""
    model.zero_grad()
    y = forward(x)
    y.float().square().sum().backward()
    return y.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]], tol: float) -> None:
    assert ours[1].keys() == expected[1].keys()
    for name, got in {"output": ours[0], **ours[1]}.items():
        want = {"output": expected[0], **expected[1]}[name]
        assert got.dtype == want.dtype, name
        assert ((got - want).abs().max() <= tol * want.abs().max()).item(), name


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("architecture", ["vit", "swin"])
def test_equals_eager(architecture: str, training: bool, tiny_vit: Make, tiny_swin: Make, randomize: Make) -> None:
    model, x = make(architecture, tiny_vit, tiny_swin, dropout=0.2)
    randomize(model, std=0.2).train(training)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(5)
    expected = step(model, model, x)
    torch.manual_seed(5)
    assert_same(step(model, compiled, x), expected, 1e-4)
    first, second = compiled(x), compiled(x)
    assert torch.equal(first, second) != training, (
        "passes must have new dropout masks in training, and only in training"
    )


@pytest.mark.parametrize("architecture", ["vit", "swin"])
def test_no_graph_breaks(
    architecture: str, tiny_vit: Make, tiny_swin: Make, graph_breaks: Callable[..., int], show: Callable[..., None]
) -> None:
    breaks = graph_breaks(*make(architecture, tiny_vit, tiny_swin))
    show("Adapted models under torch.compile", f"timm, {architecture}", "graph breaks", breaks)
    assert breaks == 0


def test_graph_breaks_are_counted(graph_breaks: Callable[..., int]) -> None:
    class Printing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            print("printing cannot be compiled")
            return x + 1

    assert graph_breaks(Printing(), torch.ones(2)) == 1


def test_equals_eager_under_autocast(tiny_vit: Make, tiny_swin: Make, randomize: Make) -> None:
    model, x = make("vit", tiny_vit, tiny_swin, dropout=0.0)
    randomize(model, std=0.2).train()
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(model, model, x)
        assert expected[0].dtype == torch.bfloat16
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_same(step(model, compiled, x), expected, 2e-2)


def test_inductor(tiny_vit: Make, randomize: Make) -> None:
    """Test the code that inductor generates, forward and backward. One block suffices, because all blocks are alike."""
    model = randomize(efft.apply(tiny_vit(depth=1), efft.EfftConfig(rank=4, dropout=0.0)), std=0.2).train()
    x = torch.randn(2, 3, 16, 16)
    expected = step(model, model, x)
    assert_same(step(model, torch.compile(model, fullgraph=True), x), expected, 1e-3)


def test_efft1_and_shared_cores_compile(tiny_vit: Make, randomize: Make) -> None:
    x = torch.randn(2, 3, 16, 16)
    efft1 = {"variant": "efft1", "trainable_scale": "matrix"}
    for config in (efft1, {"core_sharing": "shared", "trainable_scale": "global"}):
        model = randomize(efft.apply(tiny_vit(depth=1), efft.EfftConfig(rank=4, dropout=0.2, **config)), std=0.2)
        compiled = torch.compile(model.train(), fullgraph=True, backend="aot_eager")
        torch.manual_seed(5)
        expected = step(model, model, x)
        torch.manual_seed(5)
        assert_same(step(model, compiled, x), expected, 1e-4)


def test_changes_after_compiling_are_seen(adapted_vit: Make, images: Tensor, randomize: Make) -> None:
    """Changed factors, disabling, merging, unmerging and removal need no new call of torch.compile."""
    model = adapted_vit(dropout=0.0)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(compiled(images), model(images), **close)
    randomize(model, seed=9)
    torch.testing.assert_close(compiled(images), model(images), **close)
    with efft.disabled(model):
        torch.testing.assert_close(compiled(images), model(images), **close)
    unmerged = model(images)
    efft.merge(model)
    assert torch.equal(compiled(images), model(images))
    efft.unmerge(model)
    torch.testing.assert_close(compiled(images), unmerged, **close)
    efft.remove(model)
    assert torch.equal(compiled(images), model(images))


def test_gradient_checkpointing_in_a_compiled_model(adapted_vit: Make, images: Tensor) -> None:
    model = adapted_vit(dropout=0.0, std=0.2).train()
    expected = step(model, model, images)
    model.set_grad_checkpointing()
    assert_same(step(model, torch.compile(model, fullgraph=True, backend="aot_eager"), images), expected, 1e-4)


def test_blocks_compiled_one_by_one_share_a_graph(tiny_vit: Make, images: Tensor) -> None:
    """In regional compilation, all blocks use one compiled graph.

    With ``fullgraph=True``, torch raises an error if it compiles one function more than 8 times. Here are 12 blocks.
    """
    model = efft.apply(tiny_vit(depth=12), efft.EfftConfig(rank=2, dropout=0.0))
    expected = model(images)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(model(images), expected)


def test_no_surprises_in_the_state_dict(adapted_vit: Make, tiny_vit: Make, images: Tensor, tmp_path: Path) -> None:
    model = adapted_vit()
    before = copy.deepcopy(model.state_dict())
    compiled = torch.compile(model, backend="eager")
    expected = compiled(images)
    assert list(model.state_dict()) == list(before)
    assert list(compiled.state_dict()) == [f"_orig_mod.{n}" for n in before]
    efft.save_adapter(compiled, tmp_path)
    again = efft.load_adapter(tiny_vit().eval(), tmp_path)
    torch.testing.assert_close(again(images), expected)
    assert {n for n, _ in efft.named_factors(compiled)} == {n for n in before if n.startswith("efft.")}


@pytest.mark.parametrize("act", [efft.count_parameters, lambda model: efft.parameter_groups(model, lr=1.0)])
def test_a_compiled_model_counts_and_groups_as_the_plain_one(
    act: Callable[[nn.Module], Any], adapted_vit: Make
) -> None:
    model = adapted_vit()
    assert str(act(torch.compile(model, backend="eager"))) == str(act(model))


def test_applying_to_a_compiled_model_is_refused(adapted_vit: Make, tiny_vit: Make, tmp_path: Path) -> None:
    """Parameter names in a compiled model begin with _orig_mod., so its adapter would not fit a plain model."""
    efft.save_adapter(adapted_vit(), tmp_path)
    compiled = torch.compile(tiny_vit(), backend="eager")
    for act in (efft.apply, lambda model: efft.load_adapter(model, tmp_path)):
        with pytest.raises(ValueError, match=r"compiled already: adapt it .* first"):
            act(compiled)
