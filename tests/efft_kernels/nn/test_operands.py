"""Test the functions that build the two operands, D and G, of an update.

``tt_chain`` multiplies the cores of a tensor train; the tests compare it with a product per element. ``column_blocks``
and ``row_blocks`` place the products of several cores next to or below each other. ``take`` selects slices.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from efft_kernels import tt_chain
from efft_kernels.nn.bank import take
from efft_kernels.nn.operands import column_blocks, row_blocks


def chain(sizes: tuple[int, ...], ranks: tuple[int, ...], batch: tuple[int, ...] = ()) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(*batch, a, n, b, generator=generator, dtype=torch.float64)
        for (a, b), n in zip(itertools.pairwise(ranks), sizes, strict=True)
    ]


def element_by_element(cores: list[Tensor], order: str) -> Tensor:
    """Return [r_0, n_1 n_2 ..., r_last], with one matrix product per element."""
    sizes = [core.shape[1] for core in cores]
    n = int(torch.tensor(sizes).prod())
    out = torch.empty(cores[0].shape[0], n, cores[-1].shape[2], dtype=torch.float64)
    for indices in itertools.product(*map(range, sizes)):
        product = torch.eye(cores[0].shape[0], dtype=torch.float64)
        for core, i in zip(cores, indices, strict=True):
            product = product @ core[:, i]
        place = 0
        digits = list(zip(indices, sizes, strict=True))
        for i, size in digits if order == "C" else digits[::-1]:
            place = place * size + i
        out[:, place] = product
    return out


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("sizes", "inner"), [((5,), ()), ((2, 3), (4,)), ((3, 2, 4), (2, 5))])
def test_chain_is_its_definition(sizes: tuple[int, ...], inner: tuple[int, ...], order: str) -> None:
    left, right = chain(sizes, (1, *inner, 3)), chain(sizes, (3, *inner, 1))
    torch.testing.assert_close(tt_chain(left, "left", order), element_by_element(left, order)[0])
    torch.testing.assert_close(tt_chain(right, "right", order), element_by_element(right, order)[:, :, 0])


def test_chains_in_a_batch_are_chains() -> None:
    cores = chain((2, 3), (1, 4, 3), batch=(5,))
    expected = torch.stack([tt_chain([core[i] for core in cores]) for i in range(5)])
    torch.testing.assert_close(tt_chain(cores), expected)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_of_a_chain(side: str, order: str) -> None:
    ranks = (1, 2, 2, 3) if side == "left" else (3, 2, 2, 1)
    cores = [core.requires_grad_() for core in chain((2, 3, 2), ranks)]
    assert torch.autograd.gradcheck(lambda *c: tt_chain(c, side, order), cores)


def test_chain_compiles_without_graph_breaks() -> None:
    cores = chain((2, 3, 2), (1, 2, 2, 3))
    compiled = torch.compile(tt_chain, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(cores), tt_chain(cores))


@pytest.mark.parametrize(
    ("ranks", "side"), [((2, 3, 4), "left"), ((4, 3, 2), "right"), ((1, 3, 4), "right"), ((4, 3, 1), "left")]
)
def test_open_ends_are_refused(ranks: tuple[int, ...], side: str) -> None:
    end = "first" if side == "left" else "last"
    with pytest.raises(ValueError, match=rf"with 1 for the {end} rank of a {side} chain, got shapes \[\["):
        tt_chain(chain((2, 3), ranks), side)


@pytest.mark.parametrize("shapes", [[], [(1, 2)], [(1, 2, 3), (4, 2, 5)]])
def test_what_is_no_chain_is_refused(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"tt_chain: expected cores \[..., r_0, n_1, r_1\]"):
        tt_chain([torch.ones(shape) for shape in shapes])


@pytest.mark.parametrize("wrong", [{"side": "up"}, {"order": "A"}])
def test_unknown_words_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"side must be 'left' or 'right' and order 'C' or 'F', got .*'(up|A)'"):
        tt_chain(chain((2,), (1, 3)), **wrong)


def test_blocks_beside_and_below_each_other() -> None:
    U, C, V = torch.randn(6, 3), torch.randn(2, 4, 3, 5), torch.randn(5, 7)
    for l in range(2):
        columns = torch.cat([C[l, n] @ V for n in range(4)], dim=1)
        rows = torch.cat([U @ C[l, n] for n in range(4)], dim=0)
        torch.testing.assert_close(column_blocks(C, V)[l], columns)
        torch.testing.assert_close(row_blocks(U, C)[l], rows)


@pytest.mark.parametrize("indices", [[0, 1, 2], [1, 2], [2], [2, 0], [1, 1]])
def test_take(indices: list[int]) -> None:
    tensor = torch.randn(2, 3, 4)
    taken = take(tensor, 1, indices)
    assert torch.equal(taken, tensor[:, indices])
    consecutive = indices == sorted(set(indices))
    assert (taken.data_ptr() == tensor[:, indices[0]].data_ptr()) == consecutive
