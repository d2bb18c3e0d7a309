"""Test ``efft.AdapterPool``, which holds several adapters of one model and uses one or more of them in each pass.

The result for an adapter must not depend on the other adapters in the pool.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efft
from efft import methods
from efft.saving import files
from efft_kernels.nn.pooled import PooledLinear
from efft_kernels.testing import assert_close_budget
from tests.adapter_files import edit_config

Make = Callable[..., nn.Module]
Adapter = Callable[..., nn.Module]
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def alone(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(images)
    return result


def under(pool: efft.AdapterPool, adapters: Any, images: Tensor) -> Tensor:
    with pool.use(adapters) as model:
        result: Tensor = model(images)
    return result


CONFIGS = {
    "efft2": efft.EfftConfig(rank=4),
    "rectangular": efft.EfftConfig(rank=(2, 5), trainable_scale="matrix"),
    "efft1": efft.EfftConfig(variant="efft1", rank=3),
    "shared cores": efft.EfftConfig(rank=4, core_sharing="shared"),
    "attention only": efft.EfftConfig(rank=4, targets="mhsa", head=[]),
    "lora": methods.LoRAConfig(rank=3, scale=0.7),
    "fact_tk": methods.FacTTKConfig(rank=4),
    "vera": methods.VeRAConfig(rank=8),
}


def test_each_adapter_as_alone_and_in_one_batch(
    pool: efft.AdapterPool, adapter: Adapter, tiny_vit: Make, images: Tensor
) -> None:
    """The pool holds adapters of different methods, ranks, layers and core sharing."""
    models = {name: adapter(seed, config) for seed, (name, config) in enumerate(CONFIGS.items())}
    for name, model in models.items():
        pool.add(name, model)
    assert pool.names == list(CONFIGS)
    base = alone(tiny_vit().eval(), images)
    expected = {None: base, **{name: alone(model, images) for name, model in models.items()}}
    for name, want in expected.items():
        torch.testing.assert_close(under(pool, name, images), want, **CLOSE)
        torch.testing.assert_close(under(pool, [name] * 3, images), want, **CLOSE)
    for names in (["efft1", None, "lora"], ["attention only", "vera", "efft2"], ["fact_tk", "fact_tk", "rectangular"]):
        got = under(pool, names, images)
        torch.testing.assert_close(got, torch.stack([expected[n][i] for i, n in enumerate(names)]), **CLOSE)
    assert torch.equal(alone(pool.model, images), base), "outside of pool.use, the model must compute the base"


def test_windows_and_stages(tiny_swin: Make, randomize: Make) -> None:
    config = efft.EfftConfig(rank={"mhsa": 2, "ffn": (2, 4)})
    models = {name: randomize(efft.apply(tiny_swin().eval(), config), 0.2, seed) for seed, name in enumerate("ab")}
    pool, x = efft.AdapterPool(tiny_swin().eval()), torch.randn(4, 3, 32, 32)
    for name, model in models.items():
        pool.add(name, model)
    got = under(pool, ["b", "a", "a", "b"], x)
    a, b = (alone(models[name], x) for name in "ab")
    torch.testing.assert_close(got, torch.stack([b[0], a[1], a[2], b[3]]), rtol=1e-4, atol=1e-4)


def test_bfloat16(tiny_vit: Make, adapter: Adapter, images: Tensor) -> None:
    pool = efft.AdapterPool(tiny_vit().bfloat16().eval())
    low = {name: adapter(seed, dtype=torch.bfloat16) for seed, name in enumerate("ab")}
    exact = {name: alone(model.double(), images.double()) for name, model in low.items()}
    low = {name: adapter(seed, dtype=torch.bfloat16) for seed, name in enumerate("ab")}
    for name, model in low.items():
        pool.add(name, model)
    images = images.bfloat16()
    yardstick = {name: alone(model, images) for name, model in low.items()}
    for name in "ab":
        assert_close_budget(under(pool, name, images), exact[name], yardstick[name])
    rows = ["b", "a", "b"]
    for i, name in enumerate(rows):
        assert_close_budget(under(pool, rows, images)[i], exact[name][i], yardstick[name][i])
    assert under(pool, {"a": 0.5, "b": 0.5}, images).dtype == torch.bfloat16


def test_mix_is_the_weighted_sum_of_updates(
    pool: efft.AdapterPool, adapter: Adapter, tiny_vit: Make, images: Tensor
) -> None:
    models = {"a": adapter(1), "b": adapter(2, methods.LoRAConfig(rank=3))}
    for name, model in models.items():
        pool.add(name, model)
    base = tiny_vit().eval()
    for weights in ({"a": 0.5, "b": 0.5}, {"b": 0.3, "a": -1.2}, {"a": 1.0}):
        expected = {n: t.double() for n, t in base.state_dict().items()}
        for name, weight in weights.items():
            for key, tensor in efft.merged_state_dict(models[name]).items():
                expected[key] = expected[key] + weight * (tensor.double() - base.state_dict()[key].double())
        dense = tiny_vit().double().eval()
        dense.load_state_dict(expected)
        torch.testing.assert_close(
            under(pool, weights, images), alone(dense, images.double()).float(), rtol=1e-4, atol=1e-4
        )


def test_load_checks_like_load_adapter(
    pool: efft.AdapterPool, saved: tuple[nn.Module, Path], tiny_vit: Make, images: Tensor, tmp_path: Path
) -> None:
    model, folder = saved
    before = pool.model.state_dict()
    pool.load("mine", folder)
    torch.testing.assert_close(under(pool, "mine", images), alone(model, images), **CLOSE)
    after = pool.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[n], after[n]) for n in before)
    other = tiny_vit().eval()
    with torch.no_grad():
        other.blocks[0].attn.qkv.weight.add_(1)  # type: ignore[union-attr,index]
    elsewhere = efft.AdapterPool(other)
    with pytest.raises(ValueError, match="fingerprints differ"):
        elsewhere.load("mine", folder)
    with pytest.raises(ValueError, match=r"does not fit the model of this pool: .*fingerprints differ"):
        elsewhere.add("mine", model)
    assert elsewhere.names == []
    with pytest.warns(UserWarning, match="fingerprints differ"):
        elsewhere.load("mine", folder, strict=False)
    with pytest.raises(FileNotFoundError, match="no adapter in"):
        pool.load("other", tmp_path / "nowhere")


def test_a_head_that_the_description_conceals_does_not_reach_the_model(
    pool: efft.AdapterPool, saved: tuple[nn.Module, Path]
) -> None:
    _, folder = saved
    edit_config(folder, lambda d: (d["config"].update(head=["head"]), d.update(head=[])))
    before = {name: tensor.clone() for name, tensor in pool.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"its 'head' \[\] is not the one in its 'config', \['head'\]"):
        pool.load("mine", folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pool.model.state_dict().items())


def test_an_adapter_that_is_replaced_while_it_is_loaded(
    pool: efft.AdapterPool, saved: tuple[nn.Module, Path], adapted_vit: Make, images: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """If an adapter is replaced between reading its description and its weights, the complete new one is loaded."""
    _, folder = saved
    other, read = adapted_vit(rank=2, head=[]), files.read_weights

    def slow(*arguments: Any) -> bytes | None:
        monkeypatch.undo()
        efft.save_adapter(other, folder)
        return read(*arguments)

    monkeypatch.setattr(files, "read_weights", slow)
    pool.load("mine", folder)
    torch.testing.assert_close(under(pool, "mine", images), alone(other, images), **CLOSE)


def test_memory_by_formula(pool: efft.AdapterPool, adapter: Adapter, tiny_vit: Make) -> None:
    d, blocks, r, classes = 16, 2, 4, 5
    pool.add("a", adapter(1))
    # The update of a layer is D G, with D [inputs, r] and G [r, outputs]. Layers of EFFT share D.
    shared = d * r + d * r + 4 * d * r  # D: U of attention, U and Vᵀ of the MLP
    own = blocks * r * (3 * d + d + 4 * d + d)  # G of qkv, o, fc1, fc2
    head = classes * d + classes
    assert pool.bytes_per_adapter == 4 * (shared + own + head)
    pool.add("b", adapter(2))
    assert pool.bytes_per_adapter == 4 * (shared + own + head)
    pool.add("larger", adapter(3, efft.EfftConfig(rank=6)))
    assert pool.bytes_per_adapter == 4 * ((shared + own) * 6 // 4 + head)
    lora = efft.AdapterPool(tiny_vit().bfloat16())
    lora.add("a", adapter(1, methods.LoRAConfig(rank=r, head=[]), torch.bfloat16))
    assert lora.bytes_per_adapter == 2 * (own + blocks * r * (d + d + d + 4 * d)), "each layer of LoRA has its own D"


def test_others_stay_bit_equal(tiny_vit: Make, adapter: Adapter, images: Tensor) -> None:
    pool = efft.AdapterPool(tiny_vit().eval(), capacity=1)
    pool.add("a", adapter(1))
    pool.add("b", adapter(2))
    expected = under(pool, "a", images), under(pool, ["b", None, "a"], images)
    for i in range(7):
        pool.add(f"more{i}", adapter(10 + i))
        assert torch.equal(under(pool, "a", images), expected[0])
        assert torch.equal(under(pool, ["b", None, "a"], images), expected[1])
    for i in (3, 0, 6):
        pool.remove(f"more{i}")
    wanted = adapter(3, efft.EfftConfig(rank=2))
    pool.add("again", wanted)  # uses the memory of a larger adapter
    torch.testing.assert_close(under(pool, "again", images), alone(wanted, images), **CLOSE)
    assert torch.equal(under(pool, "a", images), expected[0])
    assert pool.names == ["a", "b", "more1", "more2", "more4", "more5", "again"]
    wide = adapter(4, methods.LoRAConfig(rank=7))
    pool.add("wide", wide)  # has a higher rank and does not share D, so results may differ by rounding from now on
    torch.testing.assert_close(under(pool, "wide", images), alone(wide, images), **CLOSE)
    torch.testing.assert_close(under(pool, "a", images), expected[0], **CLOSE)


def test_coming_and_going_does_not_recompile(pool: efft.AdapterPool, adapter: Adapter, images: Tensor) -> None:
    torch.compiler.reset()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    pool.add("a", adapter(1))
    compiled = torch.compile(pool.model, fullgraph=True, backend=backend)

    def check(n_graphs: int, *choices: Any) -> None:
        for choice in choices:
            with pool.use(choice):
                torch.testing.assert_close(compiled(images), pool.model(images), **CLOSE)
        assert len(graphs) == n_graphs

    check(1, "a")
    check(2, ["a", None, "a"])
    for i in range(7):
        pool.add(f"more{i}", adapter(10 + i))
        check(2, f"more{i}", "a", ["a", f"more{i}", None])
    pool.remove("more3")
    pool.add("other", adapter(20, efft.EfftConfig(rank=2)))
    check(2, "other", ["other", "a", "more5"])
    pool.add("no room", adapter(30))
    check(4, "no room", ["no room", "a", "other"])
    for i in range(9):
        pool.add(f"even more{i}", adapter(40 + i))
    # torch.compile now treats sizes as symbols, so it compiles nothing new.
    check(4, "even more8", ["even more8", "a", "other"])


def test_threads_use_adapters_of_their_own(pool: efft.AdapterPool, adapter: Adapter, images: Tensor) -> None:
    models = {name: adapter(seed) for seed, name in enumerate("ab")}
    for name, model in models.items():
        pool.add(name, model)
    expected = {name: alone(model, images) for name, model in models.items()}
    wrong: list[str] = []
    together = threading.Barrier(3)

    def serve(name: str) -> None:
        with pool.use(name) as model:
            together.wait()
            for _ in range(20):
                if not torch.allclose(model(images), expected[name], **CLOSE):
                    wrong.append(name)

    threads = [threading.Thread(target=serve, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    together.wait()
    for i in range(10):  # the pool must grow twice
        pool.add(f"more{i}", adapter(10 + i))
    for thread in threads:
        thread.join()
    assert not wrong


def test_detach_gives_the_model_back(
    tiny_vit: Make, adapter: Adapter, images: Tensor, unchanged: Callable[[nn.Module], Any]
) -> None:
    model = tiny_vit().eval()
    with unchanged(model):
        pool = efft.AdapterPool(model)
        pool.add("a", adapter(1))
        assert any(isinstance(module, PooledLinear) for module in model.modules())
        assert pool.detach() is model
    efft.AdapterPool(efft.remove(efft.apply(model)))


def test_wrong_calls(pool: efft.AdapterPool, adapter: Adapter, tiny_vit: Make, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"no adapter 'a' in this pool: known: none"):
        pool.remove("a")
    pool.add("digits", adapter(1))
    for names in ("digit", ["digits", "digit", None], {"digit": 1.0}):
        with (
            pytest.raises(ValueError, match=r"no adapter 'digit' in this pool: did you mean 'digits'\?"),
            pool.use(names),
        ):
            pass
    with pytest.raises(ValueError, match=r"expected a batch of 2 samples, .* of shape \[3, 3, 16, 16\]"):
        under(pool, ["digits", None], images)
    for nothing in ([], {}):
        with pytest.raises(ValueError, match="got nothing"), pool.use(nothing):
            pass
    with pytest.raises(ValueError, match="a finite weight for each adapter"), pool.use({"digits": float("nan")}):
        pass
    with pytest.raises(ValueError, match="expected a name that no adapter of this pool has, got 'digits'"):
        pool.add("digits", adapter(2))
    with pytest.raises(RuntimeError, match="'digits' is in use"), pool.use(["digits", None, None]):
        pool.remove("digits")
    with pytest.raises(ValueError, match="is not adapted"):
        pool.add("plain", tiny_vit())
    with pytest.raises(ValueError, match="not an update of a weight"):
        pool.add("behind", adapter(1, methods.LoRETTAAdpConfig()))
    seven = tiny_vit()
    seven.head = nn.Linear(16, 7)
    with pytest.raises(ValueError, match=r"expected 'head' to be Linear\(.*out_features=5, .*out_features=7"):
        pool.add("seven", efft.apply(seven))
    with pytest.raises(ValueError, match="'head' belongs to the head of one adapter and is updated by another"):
        pool.add("head", efft.apply(tiny_vit(), efft.EfftConfig(targets=["head"], head=[])))
    with pytest.raises(ValueError, match=r"expected a head of nn.Linear layers, got 'norm': LayerNorm"):
        pool.add("norm", efft.apply(tiny_vit(), efft.EfftConfig(head=["norm", "head"])))
    with pytest.raises(ValueError, match=r"the model has no blocks\.2"):
        pool.add("deeper", efft.apply(tiny_vit(depth=3)))
    assert pool.names == ["digits"]
    with pytest.raises(ValueError, match="in a pool already"):
        efft.AdapterPool(pool.model)
    with pytest.raises(ValueError, match="adapted already"):
        efft.AdapterPool(adapter(1))
    with pytest.raises(ValueError, match="compiled already"):
        efft.AdapterPool(torch.compile(tiny_vit(), backend="eager"))
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        efft.AdapterPool(tiny_vit(), capacity=0)


def test_no_gradients(pool: efft.AdapterPool, adapter: Adapter, images: Tensor) -> None:
    with torch.inference_mode():
        pool.add("a", adapter(1))
    pool.add("b", adapter(2))
    assert not under(pool, "a", images).requires_grad
    assert torch.is_grad_enabled()
    with torch.inference_mode():
        assert under(pool, ["a", "b", None], images).is_inference()


def test_layers_that_mix_samples_are_refused(adapter: Adapter) -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.fc(x[1:])
            return result

    pool = efft.AdapterPool(Mixing())
    pool.add("a", efft.apply(Mixing(), efft.EfftConfig(targets=["fc"], rank=2, head=[])))
    with pytest.raises(ValueError, match=r"expected the rows of 3 samples, .* shape \[2, 4\]"):
        under(pool, ["a", None, "a"], torch.randn(3, 4))
