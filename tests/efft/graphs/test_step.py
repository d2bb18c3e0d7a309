"""Test that the steps of ``efft.graph_step``, which replay CUDA graphs, train like a loop without graphs.

Models that cannot be captured, and changes that a graph cannot follow, must raise an error. On the CPU, the tests use
emulated graphs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import efft
from tests.efft.graphs.emulation import EmulatedGraphs

Make = Callable[..., nn.Module]
BATCHES = 7


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


def batches(device: torch.device, n: int = BATCHES) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(4, 3, 16, 16, generator=generator).to(device),
            torch.randint(5, (4,), generator=generator).to(device),
        )
        for _ in range(n)
    ]


def adamw(model: nn.Module, device: torch.device, **settings: Any) -> torch.optim.Optimizer:
    """Return a fused AdamW of the trained parameters, with the settings that a capture on the device needs."""
    settings = {"lr": torch.tensor(0.01, device=device), "weight_decay": 0.1, **settings}
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, fused=True, capturable=device.type == "cuda", **settings)


def sgd(model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=0.1, momentum=0.9, dampening=0.5, fused=True)


def loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: list[tuple[Tensor, Tensor]],
    *,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    accumulate: int = 1,
    clip_norm: float | None = None,
    after: Callable[[int], None] = lambda i: None,
) -> list[Tensor]:
    """Train without graphs, with the loop that the documentation of graph_step describes."""
    scaler = torch.amp.GradScaler(data[0][0].device.type, enabled=False) if scaler is None else scaler
    losses = []
    for i, batch in enumerate(data):
        with torch.autocast(data[0][0].device.type, autocast, enabled=autocast is not None):
            value = cross_entropy(model, *batch)
        losses.append(value.detach().float())
        scaler.scale(value / accumulate).backward()
        if (i + 1) % accumulate == 0:
            if clip_norm is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        after(i)
    return losses


def assert_trained_alike(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def twins(model: nn.Module, device: torch.device) -> tuple[nn.Module, nn.Module]:
    model = model.train().to(device)
    return model, copy.deepcopy(model)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16": {"autocast": torch.bfloat16},
    "clipped": {"clip_norm": 0.05},
    "accumulated": {"accumulate": 3},
    "accumulated, clipped, bfloat16": {"accumulate": 2, "clip_norm": 0.05, "autocast": torch.bfloat16},
}


@pytest.mark.parametrize("make_optimizer", [adamw, sgd])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_steps_train_as_a_loop_does(
    adapted_vit: Make, device: torch.device, make_optimizer: Any, settings: dict[str, Any]
) -> None:
    model, twin = twins(adapted_vit(0.1, dropout=0.0), device)
    data = batches(device)
    step = efft.graph_step(model, make_optimizer(model, device), cross_entropy, data[0], **settings)
    losses = [step(*batch) for batch in data]
    torch.testing.assert_close(losses, loop(twin, make_optimizer(twin, device), data, **settings), rtol=1e-4, atol=1e-5)
    assert_trained_alike(model, twin)
    if device.type == "cpu":
        # One captured graph is only a check. One graph trains, or two with accumulation: with and without the update.
        assert EmulatedGraphs.captured == (2 if settings.get("accumulate", 1) == 1 else 3)
        assert EmulatedGraphs.replayed == len(data) - settings.get("accumulate", 1)


@pytest.mark.parametrize("overflow", [False, True])
def test_float16_with_a_scaler(adapted_vit: Make, device: torch.device, overflow: bool) -> None:
    """If a gradient is infinite, the device skips the update and halves the scale, without a decision by Python."""
    model, twin = twins(adapted_vit(0.1, dropout=0.0), device)
    data = batches(device)
    if overflow:
        data[4][0][0] = torch.inf
    scalers = [torch.amp.GradScaler(device.type, init_scale=256.0, growth_interval=2) for _ in range(2)]
    settings: dict[str, Any] = {"autocast": torch.float16, "clip_norm": 1.0}
    step = efft.graph_step(model, adamw(model, device), cross_entropy, data[0], scaler=scalers[0], **settings)
    losses = [step(*batch) for batch in data]
    expected = loop(twin, adamw(twin, device), data, scaler=scalers[1], **settings)
    torch.testing.assert_close(losses, expected, rtol=1e-2, atol=1e-3, equal_nan=True)
    for a, b in zip(efft.named_factors(model), efft.named_factors(twin), strict=True):
        torch.testing.assert_close(a[1], b[1], rtol=1e-2, atol=1e-3)
    assert scalers[0].get_scale() == scalers[1].get_scale() != 256.0


@pytest.mark.parametrize("kind", ["scheduler", "numbers", "tensors"])
def test_learning_rates_change_between_steps(adapted_vit: Make, device: torch.device, kind: str) -> None:
    model, twin = twins(adapted_vit(0.1, dropout=0.0), device)
    data = batches(device)
    first = torch.tensor(0.01, device=device) if kind == "tensors" else 0.01
    optimizers = [adamw(m, device, lr=first if kind != "tensors" else first.clone()) for m in (model, twin)]

    def change(optimizer: torch.optim.Optimizer) -> Callable[[int], None]:
        if kind == "scheduler":
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return lambda i: scheduler.step()
        if kind == "numbers":
            return lambda i: optimizer.param_groups[0].update(lr=0.01 / (i + 2))
        return lambda i: optimizer.param_groups[0]["lr"].mul_(0.5)

    step = efft.graph_step(model, optimizers[0], cross_entropy, data[0])
    after = change(optimizers[0])
    for i, batch in enumerate(data):
        step(*batch)
        after(i)
    loop(twin, optimizers[1], data, after=change(optimizers[1]))
    assert_trained_alike(model, twin)
    assert type(optimizers[0].param_groups[0]["lr"]) is type(optimizers[1].param_groups[0]["lr"])


def test_random_numbers_go_on(adapted_vit: Make, device: torch.device) -> None:
    """Every step draws new masks of factor dropout. On the CPU, a loop with the same seed draws the same masks."""
    model, twin = twins(adapted_vit(0.1, dropout=0.3), device)
    data = batches(device)
    torch.manual_seed(5)
    step = efft.graph_step(model, adamw(model, device), cross_entropy, data[0])
    losses = [step(*data[0]) for _ in range(4)]
    assert len({float(loss) for loss in losses}) == 4
    if device.type == "cpu":  # on a GPU, a graph does not draw the same random numbers as a loop
        torch.manual_seed(5)
        torch.testing.assert_close(losses, loop(twin, adamw(twin, device), [data[0]] * 4), rtol=1e-4, atol=1e-5)


def test_a_model_without_an_adapter_with_statistics(device: torch.device) -> None:
    """The trial run and the captures must not change the statistics of a batch norm."""
    torch.manual_seed(0)
    model, twin = twins(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 5)), device
    )
    data = batches(device)
    step = efft.graph_step(model, sgd(model, device), cross_entropy, data[0])
    for batch in data:
        step(*batch)
    loop(twin, sgd(twin, device), data)
    assert_trained_alike(model, twin)


def test_parameters_without_a_gradient_stay(device: torch.device) -> None:
    """As in a loop, weight decay must not act on a parameter that the loss does not use."""
    model, twin = twins(nn.ModuleDict({"used": nn.Linear(8, 5), "idle": nn.Linear(8, 5)}), device)

    def loss(model: Any, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model["used"](x), labels)

    x, labels = torch.randn(4, 8, device=device), torch.tensor([0, 1, 2, 3], device=device)
    step = efft.graph_step(model, adamw(model, device), loss, (x, labels))
    for _ in range(4):
        step(x, labels)
    assert torch.equal(model["idle"].weight, twin["idle"].weight)
    assert not torch.equal(model["used"].weight, twin["used"].weight)


def test_gradients_that_exist_are_kept(adapted_vit: Make, device: torch.device) -> None:
    model, twin = twins(adapted_vit(0.1, dropout=0.0), device)
    data = batches(device)
    for m in (model, twin):
        cross_entropy(m, *data[1]).backward()
    step = efft.graph_step(model, sgd(model, device), cross_entropy, data[0])
    step(*data[0])
    loop(twin, sgd(twin, device), data[:1])
    assert_trained_alike(model, twin)


def test_a_caller_may_zero_the_gradients(adapted_vit: Make, device: torch.device) -> None:
    """The result must not depend on whether the caller also calls ``zero_grad`` after each update."""
    model, twin = twins(adapted_vit(0.1, dropout=0.0), device)
    data = batches(device)
    optimizer = adamw(model, device)
    step = efft.graph_step(model, optimizer, cross_entropy, data[0])
    optimizer.zero_grad()
    for batch in data:
        step(*batch)
        optimizer.zero_grad()
    loop(twin, adamw(twin, device), data)
    assert_trained_alike(model, twin)


def test_torch_is_told_of_every_update(running: Any) -> None:
    """Every step must change the versions of the factors, because a replay itself does not change them.

    Evaluations reuse the products of the factors as long as these versions stay equal.
    """
    model, _, step, batch = running
    before = {name: factor._version for name, factor in efft.named_factors(model)}
    step(*batch)
    assert all(factor._version > before[name] for name, factor in efft.named_factors(model))


def test_evaluation_between_steps(adapted_vit: Make, device: torch.device) -> None:
    """An evaluation uses the weights that the last replay has written."""
    model, twin = twins(adapted_vit(0.1, dropout=0.0), device)
    data = batches(device)
    step = efft.graph_step(model, adamw(model, device), cross_entropy, data[0])

    def evaluate(m: nn.Module) -> Tensor:
        m.eval()
        with torch.no_grad():
            y: Tensor = m(data[0][0]).clone()
        m.train()
        return y

    seen = []
    for batch in data:
        step(*batch)
        seen.append(evaluate(model))
    outputs: list[Tensor] = []
    loop(twin, adamw(twin, device), data, after=lambda i: outputs.append(evaluate(twin)))
    torch.testing.assert_close(seen, outputs, rtol=1e-3, atol=1e-4)


def test_named_inputs_and_constants(device: torch.device) -> None:
    model = nn.Linear(8, 5).to(device)

    def loss(model: nn.Module, x: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        return F.cross_entropy(model(x), labels, label_smoothing=smoothing)

    batch = {"x": torch.randn(4, 8), "labels": torch.tensor([0, 1, 2, 3]), "smoothing": 0.1}
    step = efft.graph_step(model, sgd(model, device), loss, batch)
    values = [float(step(**batch)) for _ in range(4)]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1]
    with pytest.raises(ValueError, match=r"input \d is not a tensor, .* expected 0.1 .* got 0.2"):
        step(**{**batch, "smoothing": 0.2})
    with pytest.raises(TypeError, match="either by position or by name"):
        step(batch["x"], labels=batch["labels"])


# Models, optimizers and losses that cannot be captured.


def refused(model: nn.Module, device: torch.device, match: str, **settings: Any) -> None:
    optimizer = settings.pop("optimizer", None) or adamw(model, device)
    loss, example = settings.pop("loss", cross_entropy), settings.pop("example", batches(device, 1)[0])
    grads = {p: p.grad for p in model.parameters()}
    with pytest.raises((ValueError, RuntimeError), match=match):
        efft.graph_step(model, optimizer, loss, example, **settings)
    assert all(p.grad is grad for p, grad in grads.items())


def test_a_model_on_the_cpu_is_refused(adapted_vit: Make) -> None:
    cpu = torch.device("cpu")
    refused(adapted_vit(), cpu, r"expected a model on one CUDA device, got one on cpu: move it with model.to")


def test_a_model_on_two_devices_is_refused(adapted_vit: Make, device: torch.device) -> None:
    model = adapted_vit().to(device)
    optimizer = adamw(model, device)
    model.head.to("meta")
    refused(model, device, r"one CUDA device, got one on \w+(:0)? and meta", optimizer=optimizer)


def test_wrappers_are_refused_by_name(adapted_vit: Make, device: torch.device) -> None:
    model = adapted_vit().to(device)

    class DistributedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    refused(DistributedDataParallel(model), device, "got a DistributedDataParallel, whose communication")


def test_offloaded_weights_are_refused(adapted_vit: Make, device: torch.device) -> None:
    model = adapted_vit().to(device)
    model.blocks[0]._hf_hook = type("Hook", (), {"offload": True})()
    refused(model, device, r"accelerate offloads those of 'blocks.0'")


OPTIMIZERS: dict[str, tuple[Callable[[list[nn.Parameter]], torch.optim.Optimizer], str]] = {
    "AdamW": (torch.optim.AdamW, "group 0 of the AdamW has capturable=False: create it with capturable=True"),
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.1), "SGD does not read its learning rate .* use SGD with fused=True"),
    "LBFGS": (torch.optim.LBFGS, "LBFGS does not read its learning rate"),
}


@pytest.mark.parametrize(("make", "match"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_that_wait_are_refused(adapted_vit: Make, device: torch.device, make: Any, match: str) -> None:
    model = adapted_vit().to(device)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    refused(model, device, match, optimizer=optimizer)


def test_an_optimizer_of_another_model_is_refused(adapted_vit: Make, device: torch.device) -> None:
    model = adapted_vit().to(device)
    other = adamw(copy.deepcopy(model), device)
    refused(model, device, "group 0 of the AdamW has parameters that are not part of the model", optimizer=other)


def test_float16_without_a_scaler_is_refused(adapted_vit: Make, device: torch.device) -> None:
    refused(adapted_vit().to(device), device, "underflow without a scaler", autocast=torch.float16)


def test_a_scaler_that_waits_is_refused(adapted_vit: Make, device: torch.device) -> None:
    model = adapted_vit().to(device)

    class Waiting(torch.optim.AdamW):
        """An optimizer that can be captured, but lets the scaler decide on the host whether to skip a step."""

        _step_supports_amp_scaling = property(lambda self: False, lambda self, value: None)

    optimizer = Waiting(
        [p for p in model.parameters() if p.requires_grad], fused=True, capturable=device.type == "cuda"
    )
    scaler = torch.amp.GradScaler(device.type)
    refused(model, device, "lets the host decide: create it with fused=True", optimizer=optimizer, scaler=scaler)


def waits(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    value = cross_entropy(model, images, labels)
    assert float(value) >= 0  # the host reads the value
    return value


def depends_on_data(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    chosen = labels.nonzero()[:, 0]
    return F.cross_entropy(model(images[chosen]), labels[chosen])


@pytest.mark.parametrize("loss", [waits, depends_on_data])
def test_losses_that_wait_are_refused(adapted_vit: Make, device: torch.device, loss: Any) -> None:
    model = adapted_vit().to(device)
    refused(model, device, r"forward and backward pass cannot be captured .* must not wait for the GPU", loss=loss)


def test_hooks_that_wait_are_refused(adapted_vit: Make, device: torch.device) -> None:
    model = adapted_vit().to(device)
    model.blocks[0].register_forward_hook(lambda module, args, y: print(y.abs().max().item()))
    refused(model, device, "a hook that logs values")


def test_other_wrong_arguments(adapted_vit: Make, device: torch.device) -> None:
    model = adapted_vit().to(device)
    refused(model, device, "accumulate must be a number of batches of at least 1, got 0", accumulate=0)
    refused(model, device, "clip_norm must be a positive number or None, got -1", clip_norm=-1)
    refused(model, device, "an example with at least one tensor", example=())
    refused(model, device, "a tuple or a mapping of tensors, got str", example="images")
    refused(model, device, r"tensor with one element, got a tensor \[4, 5\]", loss=lambda m, x, labels: m(x))
    refused(model, device, "one element, got float", loss=lambda m, x, labels: 1.0)
    frozen = torch.zeros((), device=device, requires_grad=True)
    refused(model, device, "does not depend on any parameter of the optimizer", loss=lambda m, x, labels: frozen * 1)
    with torch.no_grad():
        refused(model, device, "outside of no_grad and inference_mode")


# Changes after the capture.


@pytest.fixture
def running(adapted_vit: Make, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer, efft.GraphStep, Any]:
    """Return a model, its optimizer and its captured step, and a batch."""
    model = adapted_vit(0.1, dropout=0.0).train().to(device)
    optimizer, batch = adamw(model, device), batches(device, 1)[0]
    step = efft.graph_step(model, optimizer, cross_entropy, batch)
    step(*batch)
    step(*batch)
    return model, optimizer, step, batch


def _replace_data(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.head.weight.data = model.head.weight.data.clone()


CHANGES: dict[str, tuple[Callable[[nn.Module, torch.optim.Optimizer], object], str]] = {
    "eval": (lambda model, optimizer: model.eval(), "was switched to eval mode since the capture"),
    "one module": (lambda model, optimizer: model.blocks[0].norm1.eval(), r"'blocks.0.norm1' was switched to eval"),
    "merged": (lambda model, optimizer: efft.merge(model), "was merged, unmerged, disabled or enabled"),
    "removed": (lambda model, optimizer: efft.remove(model), "was replaced since the capture"),
    "new data": (_replace_data, "the memory of 'head.weight' was replaced"),
    "new module": (lambda model, optimizer: setattr(model, "head", nn.Linear(16, 5)), "inside the model was replaced"),
    "betas": (
        lambda model, optimizer: optimizer.param_groups[0].update(betas=(0.5, 0.9)),
        r"'betas' of the optimizer's group 0 was \(0.9, 0.999\) at the capture and is \(0.5, 0.9\)",
    ),
    "new state": (
        lambda model, optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
        "the state of the optimizer was replaced",
    ),
    "new group": (
        lambda model, optimizer: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
        "got another group",
    ),
}


@pytest.mark.parametrize(("change", "match"), CHANGES.values(), ids=CHANGES)
def test_changes_that_a_graph_cannot_follow(running: Any, change: Any, match: str) -> None:
    model, optimizer, step, batch = running
    change(model, optimizer)
    with pytest.raises(RuntimeError, match=match):
        step(*batch)


def test_batches_of_another_kind_are_refused(running: Any) -> None:
    *_, step, (images, labels) = running
    before = [p.detach().clone() for p in step._model.parameters()]
    with pytest.raises(ValueError, match=r"expected a tensor \[4, 3, 16, 16\] .* got \[3, 3, 16, 16\] .* drop_last"):
        step(images[:3], labels[:3])
    with pytest.raises(ValueError, match=r"torch.float32 for input 0 .* got \[4, 3, 16, 16\] torch.float64"):
        step(images.double(), labels)
    with pytest.raises(ValueError, match=r"arranged as in the example, \(\*, \*\), got \(\*,\)"):
        step(images)
    assert all(torch.equal(p, b) for p, b in zip(step._model.parameters(), before, strict=True))


def test_changes_in_place_are_followed(running: Any) -> None:
    """The graph reads the memory of the weights, so changes in place take effect."""
    model, _, step, batch = running
    expected = cross_entropy(copy.deepcopy(model), *batch)
    with torch.no_grad():
        for _, factor in efft.named_factors(model):
            factor.mul_(-2)
    changed = cross_entropy(copy.deepcopy(model), *batch)
    assert not torch.allclose(changed, expected)
    torch.testing.assert_close(step(*batch), changed.detach(), rtol=1e-4, atol=1e-5)


def test_every_loss_is_a_tensor_of_its_own(running: Any) -> None:
    *_, step, batch = running
    first = step(*batch)
    kept = first.clone()
    step(*batch)
    assert torch.equal(first, kept)


def test_the_emulation_takes_no_effect_at_the_capture() -> None:
    """Like a CUDA graph, the emulated graph changes nothing at the capture, and repeats the operators at a replay."""
    x, total, factor = torch.ones(3), torch.zeros(3), 2.0
    replay = EmulatedGraphs().capture(lambda: total.add_(x * factor))  # type: ignore[func-returns-value, arg-type]
    assert not total.any()
    factor = 100.0
    x.fill_(2.0)
    replay()
    replay()
    assert total.tolist() == [8.0, 8.0, 8.0]
    with pytest.raises(RuntimeError, match="not permitted"):
        EmulatedGraphs().capture(lambda: x.sum().item())  # type: ignore[arg-type, return-value]
