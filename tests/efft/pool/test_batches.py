"""Test ``efft.AdapterPool`` with a different adapter for each sample of a batch.

The pool must know which rows of a layer's input belong to which sample. It finds this out by ``find_layouts`` in the
first call of the model. The tests cover models with different orders of rows, models that mix samples, text generation,
and calls of :func:`find_layouts`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efft
from efft.pool.batches import find_layouts

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
    assert find_layouts(model, (images,), {}, len(images)) == {}
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
    with error:
        assert find_layouts(Rows("rows"), inputs, {}, 3) is None
