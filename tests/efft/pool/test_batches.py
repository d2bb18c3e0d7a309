"""Test ``efft.AdapterPool`` with a different adapter for each sample of a batch.

The pool must know which rows of a layer's input belong to which sample. It finds this out by ``find_layouts`` in the
first calls of the model. The tests cover models with different orders of rows, models that mix samples, text
generation, and calls of :func:`find_layouts`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efft
from efft.pool.batches import Layouts, find_layouts

Make = Callable[..., nn.Module]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 32}


class Rows(nn.Module):
    """Apply one linear layer to an input [batch, sequence, 8], whose rows of 8 numbers are first put in another order.

    With the order "mixed", the layer reads sums over samples.
    """

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order, self.linear = order, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        batch, sequence, width = x.shape
        if self.order == "batch first":
            return self.linear(x).sin()
        if self.order == "windows":
            return self.linear(x.reshape(2 * batch, -1, width)).reshape(x.shape)
        if self.order == "rows":
            return self.linear(x.reshape(-1, width)).reshape(x.shape)
        y: Tensor = x.transpose(0, 1)
        if self.order == "sequence first":
            return self.linear(y.contiguous()).transpose(0, 1)
        if self.order == "sequence first, rows":
            return self.linear(y.reshape(-1, width)).reshape(sequence, batch, width).transpose(0, 1)
        if self.order == "in the middle":
            middle = y.reshape(2, -1, batch, width).transpose(1, 2)  # [2, batch, sequence / 2, 8]
            return self.linear(middle).transpose(1, 2).reshape(sequence, batch, width).transpose(0, 1)
        return self.linear(x.mean(0, keepdim=True) + x.flip(0)[:1] + 0 * x) + 0 * x  # "mixed"


ORDERS = ["batch first", "windows", "rows", "sequence first", "sequence first, rows", "in the middle"]


def pooled(base: Callable[[], nn.Module], randomize: Make, config: efft.EfftConfig) -> tuple[Any, dict[Any, nn.Module]]:
    """Return a pool with the adapters a and b, and a dict with the models of a and b and, under None, the base."""
    models: dict[Any, nn.Module] = {
        name: randomize(efft.apply(base(), config), 0.5, seed).eval() for seed, name in enumerate("ab")
    }
    pool = efft.AdapterPool(base().eval())
    for name, model in models.items():
        pool.add(name, model)
    return pool, models | {None: base().eval()}


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return make()

    return base


@pytest.mark.parametrize("sequence", [6, 4], ids=["sequence 6", "as long as the batch"])
@pytest.mark.parametrize("order", ORDERS)
def test_each_sample_gets_its_adapter(order: str, sequence: int, randomize: Make) -> None:
    config = efft.EfftConfig(targets=["linear"], rank=2, head=[])
    pool, alone = pooled(seeded(lambda: Rows(order)), randomize, config)
    names = ["b", None, "a", "b"]
    for size in (sequence, 8):  # the first call determines the order
        x = torch.randn(4, size, 8)
        with torch.no_grad(), pool.use(names):
            y = pool.model(x)
            expected = torch.cat([alone[name](x[i : i + 1]) for i, name in enumerate(names)])
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_a_layer_that_mixes_samples_is_refused(randomize: Make) -> None:
    pool, _ = pooled(seeded(lambda: Rows("mixed")), randomize, efft.EfftConfig(targets=["linear"], rank=2, head=[]))
    with pool.use(["a", "b", None]), pytest.raises(ValueError, match="a layer that mixes samples"):
        pool.model(torch.randn(3, 4, 8))
    with torch.no_grad(), pool.use("a"):
        pool.model(torch.randn(3, 4, 8))


@pytest.mark.parametrize("order", ["batch first", "sequence first"])
def test_parts_called_alone(order: str, randomize: Make) -> None:
    """``forward`` can be called directly only after a call of the model, which finds the position of the batch."""
    pool, alone = pooled(seeded(lambda: Rows(order)), randomize, efft.EfftConfig(targets=["linear"], rank=2, head=[]))
    x = torch.randn(3, 3, 8)
    with torch.no_grad(), pool.use(["a", "b", None]):
        with pytest.raises(ValueError, match=r"got an input of shape \[3, 3, 8\]; .*call of the whole model"):
            pool.model.forward(x)
        pool.model(x)
        y = pool.model.forward(x)
    torch.testing.assert_close(y[1:2], alone["b"](x[1:2]), rtol=1e-4, atol=1e-5)


class SequenceFirst(nn.Module):
    """Apply two residual layers to token ids or to vectors [batch, sequence], as [sequence, batch, 8] inside."""

    def __init__(self, vectors: bool) -> None:
        super().__init__()
        self.embedding: nn.Module = nn.Linear(5, 8) if vectors else nn.Embedding(16, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.embedding(x).transpose(0, 1)
        for layer in self.layers:
            y = y + layer(y).sin()
        return y.mean(0)


@pytest.mark.parametrize("shared", [False, True], ids=["pool", "shared backbone"])
def test_samples_of_which_only_some_rows_change(shared: bool, randomize: Make) -> None:
    """Padding at the end of the first sample does not change if the order of its tokens is changed."""
    config = efft.EfftConfig(targets=["layers.*"], rank=2, head=[])
    pool, alone = pooled(seeded(lambda: SequenceFirst(vectors=False)), randomize, config)
    ids = torch.tensor([[5, 6, 0, 0], [3, 4, 7, 8], [9, 10, 11, 2], [12, 13, 14, 1]])
    with torch.no_grad():
        expected = torch.cat([alone["a"](ids[:2]), alone["b"](ids[2:])])
        if shared:
            parts = efft.SharedBackbone({name: alone[name] for name in "ab"})({"a": ids[:2], "b": ids[2:]})
            y = torch.cat([parts["a"], parts["b"]])
        else:
            with pool.use(["a", "a", "b", "b"]):
                y = pool.model(ids)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_a_first_batch_of_single_tokens(randomize: Make) -> None:
    """With one token per sample, every order of the rows is the same, so the next batch must determine the order."""
    config = efft.EfftConfig(targets=["layers.*"], rank=2, head=[])
    pool, alone = pooled(seeded(lambda: SequenceFirst(vectors=True)), randomize, config)
    x = torch.randn(4, 4, 5)
    names = ["a", "b", "b", "a"]
    with torch.no_grad(), pool.use(names):
        pool.model(x[:, :1])
        y = pool.model(x)
        expected = torch.cat([alone[name](x[i : i + 1]) for i, name in enumerate(names)])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_an_order_that_the_batch_leaves_open_is_refused(randomize: Make) -> None:
    """Another order of equal tokens is the same sample, so nothing shows where the rows of a sample are."""
    config = efft.EfftConfig(targets=["layers.*"], rank=2, head=[])
    pool, alone = pooled(seeded(lambda: SequenceFirst(vectors=False)), randomize, config)
    ids = torch.tensor([[3, 3, 3], [4, 5, 6], [7, 8, 9]])
    with torch.no_grad(), pool.use(["a", "b", "a"]):
        with pytest.raises(ValueError, match="use another number of samples"):
            pool.model(ids)
        longer = torch.cat([ids, ids + 3], 1)
        y = pool.model(longer)
    torch.testing.assert_close(y[1:2], alone["b"](longer[1:2]), rtol=1e-4, atol=1e-5)


def test_the_rows_of_a_single_sample(randomize: Make) -> None:
    """All rows belong to the only sample, even if it is divided into windows in the first dimension."""
    pool, alone = pooled(
        seeded(lambda: Rows("windows")), randomize, efft.EfftConfig(targets=["linear"], rank=2, head=[])
    )
    x = torch.randn(1, 6, 8)
    with torch.no_grad(), pool.use(["b"]):
        torch.testing.assert_close(pool.model(x), alone["b"](x), rtol=1e-4, atol=1e-5)


def test_an_input_that_all_samples_share_is_refused(randomize: Make) -> None:
    """A buffer that has as many rows as the batch has samples does not have one row per sample."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.linear = nn.Buffer(torch.randn(3, 5, 8)), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.linear(self.table).sum()

    pool, _ = pooled(seeded(Constant), randomize, efft.EfftConfig(targets=["linear"], rank=2, head=[]))
    with pool.use(["a", "b", "a"]), pytest.raises(ValueError, match="a layer that mixes samples"):
        pool.model(torch.randn(3, 5))


def test_the_default_dtype_does_not_matter(randomize: Make) -> None:
    config = efft.EfftConfig(targets=["linear"], rank=2, head=[])
    pool, alone = pooled(seeded(lambda: Rows("sequence first")), randomize, config)
    x = torch.randn(3, 4, 8)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), pool.use(["a", "b", None]):
            y = pool.model(x)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(y[1:2], alone["b"](x[1:2]), rtol=1e-4, atol=1e-5)


def test_a_leading_dimension_of_one(randomize: Make) -> None:
    """In the first batch, the rows of a sample follow one another, because the leading dimension has one entry."""

    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:  # [batch, frames, patches, 8]
            return self.linear(x.transpose(0, 1).contiguous()).sin().transpose(0, 1)

    pool, alone = pooled(seeded(Frames), randomize, efft.EfftConfig(targets=["linear"], rank=2, head=[]))
    names = ["a", "b", "a"]
    for frames in (1, 2, 3):
        x = torch.randn(3, frames, 4, 8)
        with torch.no_grad(), pool.use(names):
            y = pool.model(x)
            expected = torch.cat([alone[name](x[i : i + 1]) for i, name in enumerate(names)])
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def language_model() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'efft-kernels[hf]'")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2))  # type: ignore[no-any-return]


def test_generating_text(randomize: Make) -> None:
    """Generation calls the model with different numbers of tokens, with padding, and with a growing cache."""
    pool, alone = pooled(seeded(language_model), randomize, efft.EfftConfig(rank=2))
    ids = torch.randint(1, 32, (3, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, :2], mask[1, :2] = 0, 0
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with pool.use(["a", "b", None]):
        together = pool.model.generate(ids, attention_mask=mask, **options)
    for i, name in enumerate(["a", "b", None]):
        one = alone[name].generate(ids[i : i + 1], attention_mask=mask[i : i + 1], **options)  # type: ignore[operator]
        assert torch.equal(together[i : i + 1, : one.shape[1]], one)


def test_finding_the_order_changes_nothing(tiny_vit: Make, images: Tensor) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), tiny_vit(drop_rate=0.5)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    layouts = Layouts()
    find_layouts(model, (images,), {}, len(images), layouts)
    assert layouts.of
    assert layouts.complete
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("inputs", "error"),
    [
        ((torch.zeros(3, 2, dtype=torch.bool),), nullcontext()),
        ((torch.zeros(3, 2, dtype=torch.long),), nullcontext()),
        (("no tensor",), nullcontext()),
        ((torch.randn(3, 4, 5),), nullcontext()),  # the width is wrong, and find_layouts ignores the error of the model
    ],
    ids=["masks", "all the same", "other things", "what does not fit"],
)
def test_inputs_that_tell_nothing(inputs: tuple[Any, ...], error: AbstractContextManager[None]) -> None:
    layouts = Layouts()
    with error:
        find_layouts(Rows("rows"), inputs, {}, 3, layouts)
    assert not layouts.of
    assert not layouts.complete
