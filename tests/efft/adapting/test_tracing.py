"""Test graphs of torch.fx, from the default tracer and from timm's feature extraction.

In a graph, the module that holds the factors is called once for each adapted layer, and the graph trains its factors.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import efft

Make = Callable[..., nn.Module]


class Blocks(nn.Module):
    """Apply MLPs that the default tracer can trace. It cannot trace code that depends on sizes, such as a ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.fixture
def traced(randomize: Callable[..., nn.Module]) -> tuple[nn.Module, torch.fx.GraphModule]:
    config = efft.EfftConfig(targets=[r"layers\.\d\.[02]"], rank=3, head=[])
    model = randomize(efft.apply(Blocks().double(), config)).eval()
    return model, torch.fx.symbolic_trace(model)


X = torch.randn(5, 8, dtype=torch.float64)


def test_the_default_tracer(traced: tuple[nn.Module, torch.fx.GraphModule]) -> None:
    model, graph = traced
    torch.testing.assert_close(graph(X), model(X))
    calls = [node.target for node in graph.graph.nodes if node.op == "call_module" and node.target.startswith("efft")]
    assert len(calls) == 6
    trained = {name: p for name, p in graph.named_parameters() if p.requires_grad}
    assert set(trained) == {f"efft.{name}" for name, _ in model.efft.named_parameters()}
    expected = torch.autograd.grad(model(X).square().sum(), list(model.efft.parameters()))
    got = torch.autograd.grad(graph(X).square().sum(), [trained[f"efft.{n}"] for n, _ in model.efft.named_parameters()])
    torch.testing.assert_close(got, expected)
    assert all("__module__" not in vars(module) for module in model.modules()), (
        "tracing must not leave attributes on the modules"
    )


def test_a_graph_follows_its_factors_and_is_a_module_of_its_own(
    traced: tuple[nn.Module, torch.fx.GraphModule],
) -> None:
    model, graph = traced
    for p in model.efft.parameters():
        nn.init.normal_(p)
    expected = model(X)
    torch.testing.assert_close(graph(X), expected)
    for again in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        torch.testing.assert_close(again(X), expected)
        torch.testing.assert_close(again.float()(X.float()).double(), expected, rtol=1e-4, atol=1e-4)


def test_merging_after_tracing_does_not_count_twice(traced: tuple[nn.Module, torch.fx.GraphModule]) -> None:
    model, graph = traced
    before = model(X)
    efft.merge(model)
    torch.testing.assert_close(graph(X), before)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(X), before)
    efft.unmerge(model)
    torch.testing.assert_close(graph(X), before)


def test_factor_dropout_is_drawn_in_training(randomize: Callable[..., nn.Module]) -> None:
    config = efft.EfftConfig(targets=[r"layers\.\d\.[02]"], rank=3, head=[], dropout=0.5)
    model = randomize(efft.apply(Blocks().double(), config))
    graph = torch.fx.symbolic_trace(model.train())
    assert not torch.equal(graph(X), graph(X))
    torch.testing.assert_close(graph.eval()(X), model.eval()(X))


def test_features_of_timm(tiny_vit: Make, randomize: Callable[..., nn.Module], images: Tensor) -> None:
    features = pytest.importorskip("timm.models._features_fx", reason="needs timm: pip install 'efft-kernels[vision]'")
    model = randomize(efft.apply(tiny_vit().eval(), efft.EfftConfig(rank=4)))
    extractor = features.create_feature_extractor(model, {"blocks.0": "first", "blocks.1": "second"})
    got, seen = extractor(images), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    model(images)
    torch.testing.assert_close(got["first"], seen[0])
    torch.testing.assert_close(got["second"], seen[1])
    got["second"].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.efft.parameters())


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 1)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x


def test_convolutions(randomize: Callable[..., nn.Module]) -> None:
    config = efft.EfftConfig(targets=["layers.0", "layers.1"], rank=2, head=[])
    model = randomize(efft.apply(Convolutions().double(), config)).eval()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


def test_conv1d_of_transformers(randomize: Callable[..., nn.Module]) -> None:
    pytorch_utils = pytest.importorskip(
        "transformers.pytorch_utils", reason="needs transformers: pip install 'efft-kernels[hf]'"
    )
    base = nn.Sequential(pytorch_utils.Conv1D(12, 8), nn.GELU(), pytorch_utils.Conv1D(8, 12)).double()
    model = randomize(efft.apply(base, efft.EfftConfig(targets=["0", "2"], rank=2, head=[]))).eval()
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(X), model(X))
