"""Test ``efft.graph_serve``, which runs a model as CUDA graphs, for any number of samples.

The outputs must equal those of the model. If the model changes after the capture, the server must use the changed model
or raise an error. On the CPU, the tests use emulated graphs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efft
from tests.efft.graphs.emulation import EmulatedGraphs

Make = Callable[..., nn.Module]


def images(n: int, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).to(device)


def close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def model(adapted_vit: Make, device: torch.device) -> nn.Module:
    return adapted_vit().to(device)


@pytest.fixture
def server(model: nn.Module, device: torch.device) -> efft.GraphServer:
    return efft.graph_serve(model, (images(1, device),), (1, 2, 4), without_adapter=True)


@torch.no_grad()
def test_any_number_of_samples(model: nn.Module, server: efft.GraphServer, device: torch.device) -> None:
    assert server.sizes == [1, 2, 4]
    for n in (3, 1, 2, 4, 5, 9, 1):
        x = images(n, device, n)
        y = server(x)
        close(y, model(x))
        assert not y.requires_grad


@torch.no_grad()
def test_the_smallest_graph_is_launched(model: nn.Module, server: efft.GraphServer, device: torch.device) -> None:
    """Nine samples need three launches: two of the graph for four samples, and one of the graph for one sample."""
    if device.type != "cpu":
        pytest.skip("only the emulated graphs of the CPU count their launches")
    assert EmulatedGraphs.captured == 6
    for n, launches in ((1, 1), (3, 1), (4, 1), (9, 3)):
        EmulatedGraphs.replayed = 0
        server(images(n, device))
        assert EmulatedGraphs.replayed == launches


@torch.no_grad()
def test_requests_without_the_adapter(model: nn.Module, server: efft.GraphServer, device: torch.device) -> None:
    x = images(3, device)
    with efft.disabled(model):
        base = model(x)
    adapted = model(x)
    assert not torch.allclose(base, adapted)
    for _ in range(2):
        close(server(x, adapter=False), base)
        close(server(x), adapted)


@torch.no_grad()
def test_outputs_are_tensors_of_their_own(server: efft.GraphServer, device: torch.device) -> None:
    first = server(images(2, device, 1))
    kept = first.clone()
    server(images(2, device, 2))
    assert torch.equal(first, kept)


@torch.no_grad()
def test_changed_factors_are_seen(model: nn.Module, server: efft.GraphServer, device: torch.device) -> None:
    x = images(3, device)
    before = server(x)
    for _, factor in efft.named_factors(model):
        factor.mul_(1.3)
    after = server(x)
    assert not torch.allclose(before, after)
    close(after, copy.deepcopy(model)(x))


@torch.no_grad()
def test_a_loaded_adapter_is_seen(
    model: nn.Module, server: efft.GraphServer, device: torch.device, adapted_vit: Make, tmp_path: Any
) -> None:
    other = adapted_vit(0.3).to(device)
    state = {name: value for name, value in other.state_dict().items() if name.startswith("efft.")}
    model.load_state_dict(state, strict=False)
    x = images(2, device)
    close(server(x), other(x))


def test_inputs_from_another_device_and_in_inference_mode(model: nn.Module, server: efft.GraphServer) -> None:
    x = images(3, torch.device("cpu"))
    with torch.inference_mode():
        y = server(x)
    assert not y.is_inference()
    device = next(model.parameters()).device
    with torch.no_grad():
        close(y, model(x.to(device)))


class Named(nn.Module):
    """Return several outputs. The input ``power`` is a number, which a graph treats as a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor, power: int = 1) -> dict[str, Any]:
        y = self.fc(x) * mask[:, None] ** power
        return {"y": y, "both": (y.sum(1), "text")}


@torch.no_grad()
def test_named_inputs_and_several_outputs(device: torch.device) -> None:
    model = Named().eval().to(device)
    inputs = {"x": torch.randn(5, 4, device=device), "mask": torch.rand(5, device=device), "power": 2}
    server = efft.graph_serve(model, inputs, (2, 3))
    got, expected = server(**inputs), model(**inputs)
    close(got["y"], expected["y"])
    close(got["both"][0], expected["both"][0])
    assert got["both"][1] == "text"
    with pytest.raises(ValueError, match=r"is not a tensor, so it is a constant .* expected 2 .* got 3"):
        server(**{**inputs, "power": 3})
    with pytest.raises(TypeError, match="either by position or by name"):
        server(inputs["x"], mask=inputs["mask"])


@torch.no_grad()
@pytest.mark.parametrize("arrange", [lambda x: x, lambda x: [x], lambda x: (x,)], ids=["tensor", "list", "tuple"])
def test_arrangements_of_one_input(model: nn.Module, device: torch.device, arrange: Callable[[Tensor], Any]) -> None:
    x = images(2, device)
    close(efft.graph_serve(model, arrange(x), (2,))(x), model(x))


@torch.no_grad()
def test_autocast(model: nn.Module, device: torch.device) -> None:
    x = images(2, device)
    server = efft.graph_serve(model, (x,), (2,), autocast=torch.bfloat16)
    with torch.autocast(device.type, torch.bfloat16):
        expected = model(x)
    close(server(x), expected)


# Models and requests that are refused.


def refused(model: nn.Module, example: Any, match: str, **settings: Any) -> None:
    with pytest.raises((ValueError, RuntimeError), match=match):
        efft.graph_serve(model, example, **{"batches": (1, 2), **settings})


def test_a_model_on_the_cpu_is_refused(adapted_vit: Make) -> None:
    refused(adapted_vit(), (images(1, torch.device("cpu")),), "expected a model on one CUDA device, got one on cpu")


def test_models_that_are_refused(model: nn.Module, device: torch.device) -> None:
    x = (images(1, device),)
    refused(model, x, r"numbers of samples of at least 1, got \[0, 2\]", batches=(0, 2))
    refused(model, x, r"numbers of samples of at least 1, got \[\]", batches=())
    refused(model, (torch.zeros((), device=device),), r"first dimension indexes the same number .* shapes \[\[\]\]")
    refused(model, (images(0, device),), "at least one")
    model.blocks[1].train()
    refused(model, x, "expected a model in eval mode, but 'blocks.1' is in training mode")
    model.eval()
    efft.merge(model)
    refused(model, x, r"an update that is not merged: call efft.unmerge\(model\) first", without_adapter=True)
    efft.unmerge(model)
    refused(efft.remove(model), x, "without_adapter needs an adapted model", without_adapter=True)


def test_a_pool_is_refused(tiny_vit: Make, device: torch.device) -> None:
    model = tiny_vit().eval().to(device)
    efft.AdapterPool(model)
    refused(model, (images(1, device),), r"in an AdapterPool, .* call detach\(\) on the pool first")


def test_trained_biases_have_no_graph_without_the_adapter(tiny_vit: Make, device: torch.device) -> None:
    model = efft.apply(tiny_vit().eval(), efft.EfftConfig(rank=4, bias="adapted")).to(device)
    refused(model, (images(1, device),), "the adapter also trained biases", without_adapter=True)


class Centered(nn.Module):
    """Subtract the mean of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y - y.mean(0)


class Pooled(Centered):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y.mean(0)


class Waiting(Centered):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y if float(y.sum()) > 0 else -y


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (Centered, "output 0 of a sample depends on the other samples of its batch"),
        (Pooled, r"expected outputs with one row for each of 2 samples, got shape \[3\] for output 0"),
        (Waiting, "the forward pass of 2 samples cannot be captured as a CUDA graph"),
    ],
)
def test_forward_passes_that_are_refused(device: torch.device, kind: type[nn.Module], match: str) -> None:
    torch.manual_seed(0)
    refused(kind().eval().to(device), (torch.randn(3, 4, device=device),), match)


CHANGES: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "train": (lambda model: model.train(), "was switched to training mode"),
    "merged": (efft.merge, "was merged, unmerged, disabled or enabled"),
    "removed": (efft.remove, "was replaced since the capture"),
    "moved": (lambda model: model.double(), "the memory of .* was replaced"),
}


@pytest.mark.parametrize(("change", "match"), CHANGES.values(), ids=CHANGES)
def test_changes_that_a_graph_cannot_follow(
    model: nn.Module, server: efft.GraphServer, device: torch.device, change: Any, match: str
) -> None:
    change(model)
    with pytest.raises(RuntimeError, match=match):
        server(images(1, device))


def test_requests_that_are_refused(model: nn.Module, server: efft.GraphServer, device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"expected a tensor \[2, 3, 16, 16\] .* got \[2, 3, 8, 8\]"):
        server(torch.randn(2, 3, 8, 8, device=device))
    with pytest.raises(ValueError, match="at least one"):
        server(images(0, device))
    with_adapter_only = efft.graph_serve(model, (images(1, device),), (1,))
    with pytest.raises(ValueError, match="there is no graph without the adapter: pass without_adapter=True"):
        with_adapter_only(images(1, device), adapter=False)
