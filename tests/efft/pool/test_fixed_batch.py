"""Test fixed batches of ``efft.AdapterPool``, which allow CUDA graphs to use different adapters in each replay.

A graph that is captured with a fixed batch reads the numbers of the adapters from a tensor. A replay can therefore use
adapters that were added after the capture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import efft
from efft import methods
from efft.pool import selecting

Make = Callable[..., nn.Module]
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


@torch.no_grad()
def alone(models: dict[str | None, nn.Module], names: list[str | None], images: Tensor) -> Tensor:
    return torch.stack([models[name](images[i : i + 1])[0] for i, name in enumerate(names)])


def captured(pool: efft.AdapterPool, batch: Any, images: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that repeats the operators of one forward pass on the same tensors, like a CUDA graph."""
    with pool.use(batch) as model:
        model(images)
        graph: Callable[[Tensor], Tensor] = make_fx(model, _error_on_data_dependent_ops=False)(images)
    return torch.no_grad()(graph)


@pytest.fixture
def models(tiny_vit: Make, adapter: Make) -> dict[str | None, nn.Module]:
    return {None: tiny_vit().eval(), **{name: adapter(seed) for seed, name in enumerate("abc")}}


def test_adapters_that_are_added_after_the_capture_are_seen(
    pool: efft.AdapterPool, models: dict[str | None, nn.Module], images: Tensor
) -> None:
    pool.add("a", models["a"])
    batch = pool.fixed_batch(3)
    replay = captured(pool, batch, images)
    torch.testing.assert_close(replay(images), alone(models, [None] * 3, images), **CLOSE)
    for name in "bc":
        pool.add(name, models[name])
    choices: list[list[str | None]] = [["c", None, "b"], ["a", "b", "a"], [None, "c", "c"]]
    for names in choices:
        batch.select(names)
        other = images.flip(0)
        torch.testing.assert_close(replay(other), alone(models, names, other), **CLOSE)
    pool.remove("a")
    pool.add("new", models["b"])  # uses the memory of the removed adapter
    batch.select(["new", None, "c"])
    torch.testing.assert_close(replay(images), alone(models, ["b", None, "c"], images), **CLOSE)


@pytest.mark.parametrize("reason", ["capacity", "rank", "layers"])
def test_growth_is_refused_until_the_batch_is_released(
    reason: str, tiny_vit: Make, adapter: Make, models: dict[str | None, nn.Module], images: Tensor
) -> None:
    pool = efft.AdapterPool(tiny_vit().eval(), capacity=1 if reason == "capacity" else 4)
    pool.add("a", adapter(0, efft.EfftConfig(rank=4, targets="mhsa", head=[])) if reason == "layers" else models["a"])
    batch = pool.fixed_batch(3)
    replay = captured(pool, batch, images)
    batch.select(["a", None, "a"])
    before = replay(images)
    large = adapter(3, methods.LoRAConfig(rank=9)) if reason == "rank" else models["b"]
    with pytest.raises(RuntimeError, match=r"adapter 'large' needs new stacks .* captured with a fixed batch"):
        pool.add("large", large)
    assert pool.names == ["a"]
    assert torch.equal(replay(images), before)
    pool.release(batch)
    pool.add("large", large)
    with pool.use("large") as model:
        torch.testing.assert_close(model(images), large(images).detach(), **CLOSE)


def test_adapters_of_a_fixed_batch_are_in_use(pool: efft.AdapterPool, models: dict[str | None, nn.Module]) -> None:
    for name in "ab":
        pool.add(name, models[name])
    batch = pool.fixed_batch(2)
    batch.select(["a", "b"])
    batch.select(["b", None])
    pool.remove("a")
    with pytest.raises(RuntimeError, match="adapter 'b' is in use"):
        pool.remove("b")
    with pytest.raises(RuntimeError, match=r"1 fixed batches exist: call release\(batch\)"):
        pool.detach()
    pool.release(batch)
    pool.remove("b")
    with pytest.raises(RuntimeError, match="this fixed batch was released"):
        batch.select([None, None])
    with pytest.raises(ValueError, match="that was not released"), pool.use(batch):
        pass
    pool.detach()


def test_wrong_batches(pool: efft.AdapterPool, adapter: Make) -> None:
    with pytest.raises(ValueError, match="expected at least 1 sample and a pool with an adapter"):
        pool.fixed_batch(3)
    pool.add("a", adapter(0))
    pool.add("biased", adapter(1, efft.EfftConfig(rank=4, bias="adapted")))
    batch = pool.fixed_batch(2)
    with pytest.raises(ValueError, match=r"expected 2 names, one per sample, got \['a'\]"):
        batch.select(["a"])
    with pytest.raises(ValueError, match="got 'aa'"):
        batch.select("aa")
    with pytest.raises(ValueError, match="no adapter 'other' in this pool"):
        batch.select(["a", "other"])
    with pytest.raises(ValueError, match="adapter 'biased' has biases or norms of its own"):
        batch.select(["a", "biased"])
    assert batch.slots.tolist() == [0, 0]


# --- copies to the device ---------------------------------------------------------------------------------------------


def test_numbers_go_to_a_gpu_without_a_wait(monkeypatch: pytest.MonkeyPatch, pool: efft.AdapterPool) -> None:
    """The only transfer in :meth:`AdapterPool.use` is a copy from pinned memory that does not block."""
    calls: list[str] = []

    def pin(tensor: Tensor) -> Tensor:
        calls.append("pinned")
        return tensor

    def move(tensor: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
        calls.append(f"to {device}, non_blocking={non_blocking}")
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", move)
    assert selecting.to_device([3, 1], torch.int64, torch.device("cuda")).tolist() == [3, 1]
    assert calls == ["pinned", "to cuda, non_blocking=True"]


@pytest.mark.parametrize("adapters", [["a", None, "b"], {"a": 0.25, "b": 0.5}, "a"], ids=str)
def test_a_selection_makes_no_other_copies(
    monkeypatch: pytest.MonkeyPatch, pool: efft.AdapterPool, adapter: Make, images: Tensor, adapters: Any
) -> None:
    """Only ``to_device`` may create tensors for a selection. The layers must not create tensors from Python numbers."""
    for seed, name in enumerate("ab"):
        pool.add(name, adapter(seed))
    with pool.use(adapters) as model:
        expected = model(images)
    made: list[Tensor] = []
    to_device = selecting.to_device

    def counted(*arguments: Any) -> Tensor:
        made.append(to_device(*arguments))
        return made[-1]

    def refuse(*arguments: Any, **options: Any) -> Tensor:
        raise AssertionError("a tensor was created from numbers")

    monkeypatch.setattr("efft.pool.adapter_pool.to_device", counted)
    with pool.use(adapters) as model:
        for name in ("tensor", "as_tensor", "full"):
            monkeypatch.setattr(torch, name, refuse)
        assert torch.equal(model(images), expected)
    assert len(made) == (1 if isinstance(adapters, list) else 2)


@pytest.mark.gpu
def test_no_synchronization_and_replays_of_a_cuda_graph(tiny_vit: Make, adapter: Make, images: Tensor) -> None:
    pool, x = efft.AdapterPool(tiny_vit().cuda().eval()), images.cuda()
    models: dict[str | None, nn.Module] = {None: tiny_vit().cuda().eval()}
    models |= {name: adapter(seed).cuda() for seed, name in enumerate("abc")}
    for name in "ab":
        pool.add(name, models[name])
    batch = pool.fixed_batch(3)
    for chosen in (["a", None, "b"], {"a": 0.5, "b": 0.5}, "b", batch):  # the first calls build kernels and layouts
        with pool.use(chosen) as model:
            model(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for chosen in (["b", None, "a"], {"a": 0.25, "b": 0.5}, "a", batch):
            with pool.use(chosen) as model:
                model(x)
        batch.select(["b", "a", None])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with pool.use(batch) as model, torch.cuda.graph(graph):
        y = model(x)
    pool.add("c", models["c"])
    for names in (["c", None, "b"], ["a", "c", "c"]):
        batch.select(names)
        graph.replay()
        torch.testing.assert_close(y, alone(models, names, x), rtol=1e-3, atol=1e-3)
