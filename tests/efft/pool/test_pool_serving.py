"""Test the use of ``efft.AdapterPool``, which holds several adapters of one model.

The tests cover every backend, a quantized base, changes of the pool while threads use it, and mixes, which are weighted
sums of adapters.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efft
from efft import methods
from efft_kernels import Backend, can_run, use_backend
from efft_kernels.nn.pooled import PooledDelta, PooledLinear
from efft_kernels.testing import assert_close_budget
from tests.quantized import WAYS

Make = Callable[..., nn.Module]
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    result: Tensor = model(images)
    return result


def under(pool: efft.AdapterPool, adapters: Any, images: Tensor) -> Tensor:
    with pool.use(adapters) as model:
        return logits(model, images)


@pytest.mark.parametrize("backend", [Backend.EAGER, Backend.CPU, Backend.AUTO])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_layer_on_every_backend(
    backend: Backend, dtype: torch.dtype, tiny_vit: Make, adapter: Make, images: Tensor
) -> None:
    """A single adapter, one adapter per sample, and a mix must be as accurate as a model outside of the pool."""
    if (reason := can_run(backend, torch.empty(1, dtype=dtype))) is not None:
        pytest.skip(reason)
    pool, x = efft.AdapterPool(tiny_vit().to(dtype).eval()), images.to(dtype)
    exact, plain = {}, {}
    for seed, name in enumerate("ab"):
        model = adapter(seed, dtype=dtype)
        pool.add(name, model)
        with use_backend(Backend.EAGER):
            plain[name] = logits(model, x)
            exact[name] = logits(model.double(), x.double())
    assert sum(isinstance(module, PooledDelta) for module in pool.model.modules()) == 2 * 4, (
        "the four layers of both blocks must be in the pool"
    )
    with use_backend(backend):
        for name in "ab":
            assert_close_budget(under(pool, name, x), exact[name], plain[name])
            assert_close_budget(under(pool, {name: 1.0}, x), exact[name], plain[name])
        rows = under(pool, ["b", "a", "b"], x)
    for i, name in enumerate("bab"):
        assert_close_budget(rows[i], exact[name][i], plain[name][i])


@pytest.mark.parametrize("way", WAYS)
def test_over_a_quantised_base(way: str, tiny_vit: Make, images: Tensor, randomize: Make) -> None:
    def quantized() -> nn.Module:
        model = tiny_vit().eval()
        for module in model.blocks.modules():
            if isinstance(module, nn.Linear):
                WAYS[way](module)
        return model

    config = efft.EfftConfig(rank=4)
    models = {name: randomize(efft.apply(quantized(), config), 0.2, seed) for seed, name in enumerate("ab")}
    pool = efft.AdapterPool(quantized())
    for name, model in models.items():
        pool.add(name, model)
    expected = {name: logits(model, images) for name, model in models.items()}
    torch.testing.assert_close(under(pool, "a", images), expected["a"], **CLOSE)
    rows = under(pool, ["b", None, "a"], images)
    torch.testing.assert_close(rows[[0, 2]], torch.stack([expected["b"][0], expected["a"][2]]), **CLOSE)
    torch.testing.assert_close(rows[1], logits(quantized(), images)[1], **CLOSE)


# --- changes during use -----------------------------------------------------------------------------------------------


@pytest.fixture
def compiled_graphs() -> Iterator[list[Any]]:
    """Reset torch.compile, and yield a list to which :func:`counting` adds every compiled graph."""
    torch.compiler.reset()
    # Dynamo moves the entry that it used last to the front of its cache, while another thread may be walking through
    # the cache. That thread then misses its entry and compiles again (pytorch/pytorch#195355).
    dynamo: Any = torch._C._dynamo.eval_frame
    dynamo._set_lru_cache(False)
    yield []
    dynamo._set_lru_cache(True)
    torch.compiler.reset()


def test_coming_and_going_beside_a_serving_thread(
    pool: efft.AdapterPool, adapter: Make, images: Tensor, compiled_graphs: list[Any]
) -> None:
    """Another thread continues with its compiled model, without wrong results and without a new compilation."""

    def counting(graph: Any, inputs: Any) -> Any:
        compiled_graphs.append(graph)
        return graph.forward

    stays, choices = adapter(1), ("stays", ["stays", None, "stays"])
    pool.add("stays", stays)
    expected = logits(stays, images)
    base = logits(pool.model, images)
    expected_of = (expected, torch.stack([expected[0], base[1], expected[2]]))
    compiled = torch.compile(pool.model, fullgraph=True, backend=counting)
    newcomers = [adapter(10 + i) for i in range(4)]
    wrong: list[str] = []
    warm, done = threading.Event(), threading.Event()
    passes = 0

    def serve() -> None:
        nonlocal passes
        while not done.is_set():
            for choice, want in zip(choices, expected_of, strict=True):
                with pool.use(choice):
                    if not torch.allclose(compiled(images), want, **CLOSE):
                        wrong.append(str(choice))
            passes += 1
            warm.set()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        assert warm.wait(120)
        before = passes
        for round_ in range(3):
            for i, model in enumerate(newcomers):
                pool.add(f"new{i}", model)
                with pool.use([f"new{i}", "stays", None]):  # this thread also uses the pool
                    got = compiled(images)
                want = torch.stack([logits(model, images)[0], expected[1], base[2]])
                torch.testing.assert_close(got, want, **CLOSE, msg=f"round {round_}, adapter {i}")
            for i in range(len(newcomers)):
                pool.remove(f"new{i}")
        assert passes > before, "the other thread must have run in the meantime"
    finally:
        done.set()
        thread.join(120)
    assert not wrong
    assert len(compiled_graphs) == len(choices), (
        "torch.compile must create one graph for a single adapter, and one for an adapter per sample"
    )


# --- mixes of adapters ------------------------------------------------------------------------------------------------


def test_a_mix_is_exactly_the_weighted_sum(tiny_vit: Make, adapter: Make, images: Tensor) -> None:
    """The test checks mixes in fp64: alone, in a batch, in a mix of mixes, and after the mixed adapters are removed."""
    x = images.double()
    base = tiny_vit().double().eval()
    configs = {"a": efft.EfftConfig(rank=4), "b": methods.LoRAConfig(rank=3), "c": efft.EfftConfig(rank=2, head=[])}
    models = {name: adapter(seed, config, torch.float64) for seed, (name, config) in enumerate(configs.items())}
    pool = efft.AdapterPool(tiny_vit().double().eval())
    for name, model in models.items():
        pool.add(name, model)

    def dense(weights: dict[str, float]) -> Tensor:
        state = {n: t.clone() for n, t in base.state_dict().items()}
        for name, weight in weights.items():
            for key, tensor in efft.merged_state_dict(models[name]).items():
                state[key] += weight * (tensor - base.state_dict()[key])
        plain = tiny_vit().double().eval()
        plain.load_state_dict(state)
        return logits(plain, x)

    exact: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
    pool.add_mix("blend", {"a": 0.3, "b": 0.7})
    blend = dense({"a": 0.3, "b": 0.7})
    torch.testing.assert_close(under(pool, "blend", x), blend, **exact)
    torch.testing.assert_close(under(pool, {"a": 0.3, "b": 0.7}, x), blend, **exact)
    pool.add_mix("more", {"blend": -0.5, "c": 0.2})
    more = dense({"a": -0.15, "b": -0.35, "c": 0.2})
    torch.testing.assert_close(under(pool, "more", x), more, **exact)
    for name in models:
        pool.remove(name)
    rows = under(pool, ["more", None, "blend"], x)
    torch.testing.assert_close(rows, torch.stack([more[0], logits(base, x)[1], blend[2]]), **exact)
    assert pool.names == ["blend", "more"]


def test_a_mix_takes_the_memory_of_its_rank(pool: efft.AdapterPool, adapter: Make) -> None:
    """The update of a layer is D G. Layers must still share D, and zeros that pad lower ranks must not be stored."""
    for name, rank in (("a", 4), ("b", 2)):
        pool.add(name, adapter(1, efft.EfftConfig(rank=rank, head=[])))
    four = pool.bytes_per_adapter
    pool.add_mix("blend", {"a": 0.5, "b": 0.5})
    assert pool.bytes_per_adapter * 4 == four * 6
    layers = [module for module in pool.model.modules() if isinstance(module, PooledLinear)]
    assert len({id(layer.stacks[0]) for layer in layers}) == 3, (
        "the shared D must be U of attention, U of the MLP, and Vᵀ of the MLP"
    )


def test_mixes_that_cannot_be(pool: efft.AdapterPool, adapter: Make) -> None:
    pool.add("digits", adapter(1))
    for weights, message in (
        ({"digit": 1.0}, "no adapter 'digit' in this pool: did you mean 'digits'"),
        ({}, "got nothing"),
        ({"digits": float("inf")}, "a finite weight for each adapter"),
        ("digits", r"add_mix: expected \{name: weight, ...\}, got 'digits'"),
    ):
        with pytest.raises(ValueError, match=message):
            pool.add_mix("blend", weights)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a name that no adapter of this pool has, got 'digits'"):
        pool.add_mix("digits", {"digits": 1.0})
    assert pool.names == ["digits"]
