"""Test pools of adapters with trained biases and norms, which can serve a complete batch but not single samples."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import efft
from efft.adapting.inject import adapter_of

Make = Callable[..., nn.Module]


@pytest.fixture
def trained(adapter: Make) -> Make:
    """Return a model with an adapter, trained biases and norms, and a head. ``seed`` determines their values."""

    def make(seed: int, dtype: torch.dtype = torch.float32, **fields: object) -> nn.Module:
        settings = {"rank": 4, "bias": "all", "norms": True, **fields}
        model = adapter(seed, efft.EfftConfig(**settings), dtype)
        generator = torch.Generator().manual_seed(seed)
        names = set(adapter_of(model).extras)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in names:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
        return model

    return make


@pytest.mark.parametrize("loaded", [False, True], ids=["added", "loaded"])
def test_each_adapter_as_alone(
    loaded: bool,
    pool: efft.AdapterPool,
    adapter: Make,
    trained: Make,
    images: Tensor,
    tmp_path: Path,
    unchanged: Callable[[nn.Module], AbstractContextManager[None]],
) -> None:
    models = {"all": trained(1), "plain": adapter(2), "adapted": trained(3, bias="adapted", norms=False)}
    base = pool.model(images)
    state = {name: t.clone() for name, t in pool.model.state_dict().items()}
    for name, model in models.items():
        if loaded:
            pool.load(name, efft.save_adapter(model, tmp_path / name))
        else:
            pool.add(name, model)
    assert all(torch.equal(t, state[name]) for name, t in pool.model.state_dict().items())
    assert torch.equal(pool.model(images), base)
    for name, model in models.items():
        with pool.use(name):
            torch.testing.assert_close(pool.model(images), model(images), rtol=1e-5, atol=1e-5)
    assert torch.equal(pool.model(images), base)
    pool.remove("all")
    pool.add("again", adapter(4))  # uses the memory of the adapter with biases
    with pool.use("again"):
        torch.testing.assert_close(pool.model(images), adapter(4)(images), rtol=1e-5, atol=1e-5)
    with pool.use(["again", "plain", None]):
        pool.model(images)


def test_more_adapters_than_room(tiny_vit: Make, trained: Make, images: Tensor) -> None:
    pool = efft.AdapterPool(tiny_vit().eval(), capacity=1)
    for seed in range(3):
        pool.add(str(seed), trained(seed))
    for seed in range(3):
        with pool.use(str(seed)):
            torch.testing.assert_close(pool.model(images), trained(seed)(images), rtol=1e-5, atol=1e-5)


def test_a_mix_has_the_weighted_sum(pool: efft.AdapterPool, trained: Make, images: Tensor) -> None:
    models = {"a": trained(1), "b": trained(2)}
    weights = {"a": 0.7, "b": -0.4}
    for name, model in models.items():
        pool.add(name, model)
    expected = {}
    for name, p in pool.model.named_parameters():
        if name in adapter_of(models["a"]).extras:
            own = {key: dict(model.named_parameters())[name] for key, model in models.items()}
            expected[name] = p + sum(w * (own[key] - p) for key, w in weights.items())
    dense = dict(efft.merged_state_dict(models["a"]))
    base = dict(pool.model.state_dict())
    other = efft.merged_state_dict(models["b"])
    state = {n: base[n] + 0.7 * (dense[n] - base[n]) - 0.4 * (other[n] - base[n]) for n in base}
    assert all(torch.allclose(state[name], value, atol=1e-6) for name, value in expected.items())
    with pool.use(weights):
        got = pool.model(images)
    pool.add_mix("mix", weights)
    with pool.use("mix"):
        torch.testing.assert_close(pool.model(images), got, rtol=1e-5, atol=1e-5)
    model = pool.detach()
    model.load_state_dict(state)
    torch.testing.assert_close(model(images), got, rtol=1e-5, atol=1e-5)


def test_single_samples_are_refused(pool: efft.AdapterPool, adapter: Make, trained: Make) -> None:
    pool.add("a", trained(1))
    pool.add("b", adapter(2))
    with (
        pytest.raises(ValueError, match=r"adapter 'a' has biases or norms of its own .*use\('a'\)"),
        pool.use(["b", "a"]),
    ):
        pass
    pool.add_mix("mix", {"a": 0.5, "b": 0.5})
    with pytest.raises(ValueError, match="adapter 'mix' has biases or norms of its own"), pool.use(["mix", "b"]):
        pass


def test_bfloat16(tiny_vit: Make, trained: Make, images: Tensor) -> None:
    pool = efft.AdapterPool(tiny_vit().bfloat16().eval())
    model = trained(1, torch.bfloat16)
    pool.add("a", model)
    with pool.use("a"):
        assert (pool.model(images.bfloat16()) - model(images.bfloat16())).abs().max() <= 0.05


def test_threads_use_adapters_of_their_own(pool: efft.AdapterPool, trained: Make, images: Tensor) -> None:
    models = {str(seed): trained(seed) for seed in (1, 2)}
    for name, model in models.items():
        pool.add(name, model)
    expected = {name: model(images) for name, model in models.items()}
    wrong: list[str] = []

    def serve(name: str) -> None:
        for _ in range(20):
            with pool.use(name):
                if not torch.allclose(pool.model(images), expected[name], atol=1e-5):
                    wrong.append(name)

    threads = [threading.Thread(target=serve, args=(name,)) for name in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_compiled(pool: efft.AdapterPool, trained: Make, images: Tensor) -> None:
    pool.add("a", trained(1))
    torch.compiler.reset()
    compiled = torch.compile(pool.model, backend="eager", fullgraph=True)
    with torch.no_grad():
        with pool.use("a"):
            torch.testing.assert_close(compiled(images), trained(1)(images), rtol=1e-5, atol=1e-5)
        pool.remove("a")
        pool.add("b", trained(2))
        with pool.use("b"):
            torch.testing.assert_close(compiled(images), trained(2)(images), rtol=1e-5, atol=1e-5)


def test_detach_gives_the_model_back(
    tiny_vit: Make, trained: Make, unchanged: Callable[[nn.Module], AbstractContextManager[None]]
) -> None:
    model = tiny_vit().eval()
    with unchanged(model):
        pool = efft.AdapterPool(model)
        pool.add("a", trained(1))
        pool.detach()


def test_layers_that_come_later_are_refused(pool: efft.AdapterPool, trained: Make, adapter: Make) -> None:
    pool.add("a", trained(1, targets="mhsa"))
    with pytest.raises(ValueError, match="of which an earlier adapter only trained the bias"):
        pool.add("b", adapter(2))
