"""Compare adapted experts with experts whose weights are the dense sums of weight and update.

A bank is a module that holds factors, and a site is the part of a bank that one weight uses. Other tests cover the
routing of tokens to experts, merging, copies, compilation and refused arguments.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efft_kernels import ExpertWeight, Routing, Site, TTFactors, expert_linear
from efft_kernels.nn.factors import Masks
from efft_kernels.nn.parameter import put_update, restore_module

N_EXPERTS, D_IN, D_OUT = 4, 8, 12
EACH = tuple(range(N_EXPERTS))
SITES = {
    "one block": Site(1, EACH, experts=N_EXPERTS),
    "two blocks": Site(1, tuple(range(2 * N_EXPERTS)), experts=N_EXPERTS),
    "interleaved": Site(1, tuple(range(2 * N_EXPERTS)), experts=N_EXPERTS, interleaved=True),
    "transposed": Site(1, tuple(range(8, 12)), transpose=True, mask_scope=1, experts=N_EXPERTS),
    "columns": Site(1, (3, 1, 0, 2), columns=(2, 9), experts=N_EXPERTS),
    "columns transposed": Site(1, EACH, transpose=True, columns=(2, 9), experts=N_EXPERTS),
}


def make_bank(**kwargs: Any) -> TTFactors:
    kwargs = {"rank": (3, 5), "n_layers": 3, "n_cores": 12, "scale": 0.7, "dtype": torch.float64, **kwargs}
    bank = TTFactors(D_IN, D_OUT, **kwargs)
    for factor in bank.parameters():
        nn.init.normal_(factor, std=0.5)
    return bank


@pytest.fixture
def dense(update: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that computes the updates of all experts of a site, [experts, in_features, out_features]."""

    def of(bank: TTFactors, site: Site, masks: Masks | None = None) -> Tensor:
        one = [dataclasses.replace(site, cores=(core,), experts=0, interleaved=False) for core in site.cores]
        blocks = torch.stack([update(bank, each, masks) for each in one])  # [experts * blocks, in, out]
        blocks = blocks.unflatten(0, (site.experts, -1)).movedim(1, -1 if site.interleaved else -2)
        return blocks.flatten(-2)

    return of


def draw_masks(bank: TTFactors, monkeypatch: pytest.MonkeyPatch) -> Masks:
    """Draw and return masks for all layers. From now on, ``bank`` uses the masks of layer 1."""
    shapes = (3, 2, *bank.U.shape), (3, *bank.C.shape[1:]), (3, 2, *bank.V.shape)
    masks = Masks(*(torch.rand(shape) > bank.dropout for shape in shapes))
    drawn = Masks(*(mask[1:2] for mask in masks))
    monkeypatch.setattr(bank, "draw_masks", lambda n: drawn)
    return masks


class Product(nn.Module):
    """Compute only the products of the experts.

    The parameter has the layout [experts, d_out, d_in] or, with ``transposed=True``, [experts, d_in, d_out].
    """

    def __init__(self, bank: TTFactors, site: Site, transposed: bool = False, dtype: Any = torch.float64) -> None:
        super().__init__()
        d_in, d_out = bank.sizes(site)
        self.matrices = nn.Parameter(
            torch.randn(site.experts, *((d_in, d_out) if transposed else (d_out, d_in)), dtype=dtype)
        )
        self.update = ExpertWeight(self, "matrices", bank, site, transposed=transposed)

    def forward(self, x: Tensor, routing: Routing, tokens: bool = True) -> Tensor:
        W = self.update.matrices(self.matrices)
        y = expert_linear(x[routing.tokens] if tokens else x, W, routing.offsets)
        return self.update.add_update(y, x, routing.offsets, routing.tokens if tokens else None)


def by_hand(x: Tensor, routing: Routing, W: Tensor) -> Tensor:
    return torch.stack([x[t] @ W[e] for t, e in zip(routing.tokens, routing.experts, strict=True)])


#: Choices of the router. They include experts without a token, experts with one token, all tokens at one expert, and a
#: single token.
CHOICES = {
    "mixed": [[0, 2], [2, 3], [2, 0], [3, 2], [0, 3]],
    "one token for one": [[1, 0], [0, 2], [0, 2]],
    "all at one": [[3], [3], [3]],
    "one token": [[2, 1]],
    "no token": [],
}


@pytest.mark.parametrize("choice", CHOICES)
def test_routing(choice: str) -> None:
    chosen = torch.tensor(CHOICES[choice], dtype=torch.long).view(-1, 2 if choice != "all at one" else 1)
    routing = Routing.of(chosen, N_EXPERTS)
    weights = torch.randn(chosen.shape, dtype=torch.float64)
    assert routing.offsets.dtype == torch.int32
    assert routing.offsets.tolist() == [int((chosen <= e).sum()) for e in range(N_EXPERTS)]
    assert torch.equal(chosen.flatten()[routing.order], routing.experts)
    assert (routing.experts.diff() >= 0).all()
    values = torch.randn(len(chosen), N_EXPERTS, 3, dtype=torch.float64)  # the output of every expert for every token
    got = routing.combine(values[routing.tokens, routing.experts], weights)
    assert got.shape == (len(chosen), 3)
    for t, chosen_for_t in enumerate(chosen):
        torch.testing.assert_close(got[t], (weights[t][:, None] * values[t, chosen_for_t]).sum(0))


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("sharing", ["per_layer", "shared"])
@pytest.mark.parametrize("scale", [False, "matrix"])
def test_what_a_site_stands_for(dense: Callable[..., Tensor], site: str, sharing: str, scale: Any) -> None:
    bank = make_bank(core_sharing=sharing, trainable_scale=scale)
    D, G = bank.evaluated(SITES[site])
    assert (D.shape[0], *G.shape) == (bank.sizes(SITES[site])[0], N_EXPERTS, D.shape[1], G.shape[2])
    assert G.shape[2] == bank.sizes(SITES[site])[1]
    torch.testing.assert_close(D @ G, dense(bank, SITES[site]))


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_product_and_gradients(
    dense: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, site: str, prepared: bool, dropout: float
) -> None:
    """Compare with autograd through the dense sum of weight and update.

    With dropout, masks multiply the factors of the update.
    """
    bank = make_bank(dropout=dropout, trainable_scale="matrix")
    model = Product(bank, SITES[site], transposed="columns" in site)
    masks = draw_masks(bank, monkeypatch) if dropout else None
    x = torch.randn(5, bank.sizes(SITES[site])[0], dtype=torch.float64, requires_grad=True)
    routing = Routing.of(torch.tensor(CHOICES["mixed"]), N_EXPERTS)
    if prepared:
        bank.prepare()
    y = model(x, routing)
    bank.release()
    exact = by_hand(x, routing, model.update.matrices(model.matrices) + dense(bank, SITES[site], masks))
    torch.testing.assert_close(y, exact)
    torch.testing.assert_close(model(x[routing.tokens], routing, tokens=False), exact)
    wanted = [x, *bank.parameters()]
    gy = torch.randn_like(y)
    for got, right in zip(torch.autograd.grad(y, wanted, gy), torch.autograd.grad(exact, wanted, gy), strict=True):
        torch.testing.assert_close(got, right)


def test_layers_of_experts_beside_plain_ones(update: Callable[..., Tensor], dense: Callable[..., Tensor]) -> None:
    """Experts and plain layers share a tensor train. Composing their sites together or one by one is equivalent."""
    for sharing in ("per_layer", "shared"):
        bank = make_bank(core_sharing=sharing, dropout=0.0)
        sites = [dataclasses.replace(site, layer=layer) for layer in (2, 0) for site in SITES.values()]
        sites += [Site(layer, (11,), transpose=True) for layer in range(3)]
        bindings = [bank.bind(site) for site in sites]
        alone = [bank.down_up(binding) for binding in bindings]
        bank.prepare()
        for binding, site, operands in zip(bindings, sites, alone, strict=True):
            for together, single in zip(bank.down_up(binding), operands, strict=True):
                torch.testing.assert_close(together, single)
            D, G = bank.pair(site, *bank.down_up(binding))
            torch.testing.assert_close(D @ G, dense(bank, site) if site.experts else update(bank, site))
        bank.release()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merging(dense: Callable[..., Tensor], dtype: torch.dtype, transposed: bool) -> None:
    """Merging adds in fp32 and rounds once. Unmerging restores the exact weight in the same memory."""
    factors = torch.float64 if dtype == torch.float64 else torch.float32
    bank = make_bank(dtype=factors)
    for site in SITES.values():
        model = Product(bank, site, transposed, dtype)
        before, memory = model.matrices.detach().clone(), model.matrices.data_ptr()
        delta = model.update.matrices(dense(bank, site)).detach() if not transposed else dense(bank, site).detach()
        torch.testing.assert_close(model.update.delta_weight(), delta)
        loss = model.update.merge()
        assert model.update.merged
        assert model.update.merge() is None
        torch.testing.assert_close(model.matrices.detach(), (before.to(factors) + delta).to(dtype))
        rounded = (model.matrices.detach().to(factors) - before.to(factors)) - delta
        assert loss.relative_update == pytest.approx((delta.norm() / before.to(factors).norm()).item(), rel=1e-4)
        assert loss.relative_error == pytest.approx((rounded.norm() / delta.norm()).item(), rel=1e-3, abs=1e-6)
        model.update.unmerge()
        model.update.unmerge()
        assert torch.equal(model.matrices, before)
        assert model.matrices.data_ptr() == memory
        assert not model.update.merged


def test_the_merged_base_moves_with_the_module_and_is_not_saved() -> None:
    model = Product(make_bank(), SITES["one block"])
    model.update.merge()
    names = list(model.state_dict())
    model.to(torch.float32)
    assert names == ["matrices"]
    assert model.update.base_weight.dtype == torch.float32
    assert [name for name, _ in model.named_buffers()] == ["base_matrices"]
    model.update.unmerge()
    assert not list(model.named_buffers())


def test_copies_have_their_own_parameter() -> None:
    model = nn.ModuleDict({"bank": make_bank()})
    model["experts"] = Product(model["bank"], SITES["one block"])
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        update = copied["experts"].update
        assert update.weight is copied["experts"].matrices
        assert update.factors is copied["bank"]
        update.merge()
        assert not model["experts"].update.merged


def test_a_compiled_graph_without_breaks() -> None:
    bank = make_bank(dtype=torch.float32)
    model = Product(bank, SITES["two blocks"], dtype=torch.float32)
    routing = Routing.of(torch.tensor(CHOICES["mixed"]), N_EXPERTS)
    x = torch.randn(5, D_IN, requires_grad=True)
    wanted = [x, *bank.parameters()]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, routing), model(x, routing))
    for got, right in zip(
        torch.autograd.grad(compiled(x, routing).sin().sum(), wanted),
        torch.autograd.grad(model(x, routing).sin().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(got, right)


def test_under_autocast_in_the_dtype_of_the_weight() -> None:
    model = Product(make_bank(dtype=torch.float32), SITES["two blocks"], dtype=torch.float32)
    routing, x = Routing.of(torch.tensor(CHOICES["mixed"]), N_EXPERTS), torch.randn(5, D_IN)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x, routing)
    assert torch.equal(y, model(x, routing))


def test_what_is_refused() -> None:
    bank = make_bank()
    for site, reason in (
        (Site(0, (0, 1, 2), experts=2), "the same number of cores"),
        (Site(0, (0, 1), interleaved=True), "interleaved"),
        (Site(0, tuple(range(8)), transpose=True, experts=4), "transposed tensor train has one core"),
        (Site(0, (0, 12), experts=2), "does not fit a bank"),
    ):
        with pytest.raises(ValueError, match=reason):
            bank.bind(site)
    model = Product(bank, SITES["one block"])
    for site, reason in (
        (SITES["two blocks"], r"\(in_features, out_features\) = \(8, 24\), got \(8, 12\)"),
        (Site(0, (0, 1), experts=2), "expected a site of 4 experts"),
        (Site(0, (0,)), "expected a site of 4 experts"),
    ):
        with pytest.raises(ValueError, match=reason):
            ExpertWeight(model, "matrices", bank, site)
    with pytest.raises(TypeError, match="there is no such parameter"):
        ExpertWeight(model, "weight", bank, SITES["one block"])
    with pytest.raises(TypeError, match=r"expected floating-point matrices .* got \[12, 8\]"):
        ExpertWeight(nn.Linear(D_IN, D_OUT), "weight", bank, SITES["one block"])
    model.matrices = nn.Parameter(model.matrices.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(TypeError, match="float8_e4m3fn"):
        ExpertWeight(model, "matrices", bank, SITES["one block"])
    put_update(Product(bank, SITES["one block"]).update)
    adapted = Product(bank, SITES["one block"])
    put_update(adapted.update)
    with pytest.raises(TypeError, match="adapted already"):
        ExpertWeight(adapted, "matrices", bank, SITES["one block"])


class Reader(nn.Module):
    """Multiply by all experts at once with torch calls of its own, so that the module reads the parameter itself."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(shape, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:  # [experts, rows, d_in]
        return torch.bmm(x, self.matrices.transpose(1, 2)) + x @ self.matrices[1].t()


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_module_that_reads_the_parameter_itself(
    dense: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, site: str, dropout: float
) -> None:
    """The module reads the sums of the weights and the updates of the current forward pass."""
    bank = make_bank(dropout=dropout)
    d_in, d_out = bank.sizes(SITES[site])
    model = Reader((N_EXPERTS, d_out, d_in))
    x = torch.randn(N_EXPERTS, 3, d_in, dtype=torch.float64, requires_grad=True)
    weight = ExpertWeight(model, "matrices", bank, SITES[site])
    plain = model(x)
    put_update(weight)
    masks = draw_masks(bank, monkeypatch) if dropout else None
    bank.prepare()
    y = model(x)
    assert not bank.release()
    exact = torch.func.functional_call(
        Reader((1,)), {"matrices": weight.stored + dense(bank, SITES[site], masks).transpose(1, 2)}, (x,)
    )
    torch.testing.assert_close(y, exact)
    wanted = [x, *bank.parameters()]
    for got, right in zip(
        torch.autograd.grad(y.sin().sum(), wanted), torch.autograd.grad(exact.sin().sum(), wanted), strict=True
    ):
        torch.testing.assert_close(got, right)
    weight.enabled = False
    assert torch.equal(model(x), plain)
    restore_module(model)
    assert type(model) is Reader


class Batched(nn.Module):
    """Multiply one batch of rows per expert, as Llama 4 does. All batches have the same size."""

    def __init__(self, matrices: Tensor) -> None:
        super().__init__()
        self.matrices = nn.Parameter(matrices)

    def forward(self, x: Tensor) -> Tensor:  # [experts, rows, d_in]
        return torch.bmm(x, self.matrices) * (x @ self.matrices) + x.matmul(self.matrices)


@pytest.mark.parametrize("site", SITES)
def test_a_batch_of_products_takes_no_dense_weights(dense: Callable[..., Tensor], site: str) -> None:
    bank = make_bank()
    d_in, d_out = bank.sizes(SITES[site])
    model = Batched(torch.randn(N_EXPERTS, d_in, d_out, dtype=torch.float64))
    weight = put_update(ExpertWeight(model, "matrices", bank, SITES[site], transposed=True))
    x = torch.randn(N_EXPERTS, 3, d_in, dtype=torch.float64, requires_grad=True)
    y, exact = model(x), Batched(weight.stored + dense(bank, SITES[site]))
    assert weight.binding.used
    assert not weight.binding.dense
    torch.testing.assert_close(y, exact(x))
    wanted = [x, *bank.parameters()]
    right = torch.func.functional_call(exact, {"matrices": weight.stored + dense(bank, SITES[site])}, (x,))
    for got, expected in zip(
        torch.autograd.grad(y.sin().sum(), wanted), torch.autograd.grad(right.sin().sum(), wanted), strict=True
    ):
        torch.testing.assert_close(got, expected)
    one_row = torch.randn(3, d_in, dtype=torch.float64)  # has two dimensions, so the product uses the dense weight
    torch.testing.assert_close(one_row @ model.matrices, one_row @ exact.matrices)
    assert weight.binding.dense
