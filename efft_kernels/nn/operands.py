"""Compose D and G, the two factors of a layer's update ``ΔW = D G``, from smaller factors, for user-defined methods.

The functions are plain differentiable torch code without kernels. They compute tensors of the size of the factors,
which takes about a thousandth of the time of the products that ``tt_linear`` computes with D and G.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def tt_chain(cores: Sequence[Tensor], side: str = "left", order: str = "C") -> Tensor:
    """Contract a chain of tensor-train cores into one matrix, the A (used as D) or the B (used as G) of ``ΔW = A B``.

    Args:
        cores: ``[..., r_0, n_1, r_1], [..., r_1, n_2, r_2], ...`` all in the same floating-point dtype. Leading
            dimensions are a batch of chains.
        side: ``"left"`` for the tensor train of an input, where r_0 = 1; ``"right"`` for the tensor train of an output,
            where the last rank is 1.
        order: how the indices of the cores are combined into one index of the matrix, as in numpy's reshape. In ``"C"``
            the last core's index varies fastest, in ``"F"`` the first core's.

    Returns:
        A ``[..., n_1 n_2 ..., r]`` for a left chain, or B ``[..., r, n_1 n_2 ...]`` for a right chain.

    Raises:
        ValueError: the ranks do not match, or the side or order is unknown.
    """
    if side not in ("left", "right") or order not in ("C", "F"):
        raise ValueError(f"tt_chain: side must be 'left' or 'right' and order 'C' or 'F', got {side!r} and {order!r}")
    ranks = [(core.shape[-3], core.shape[-1]) for core in cores if core.dim() >= 3]
    linked = len(ranks) == len(cores) > 0 and all(a[1] == b[0] for a, b in itertools.pairwise(ranks))
    if not linked or (ranks[0][0] if side == "left" else ranks[-1][1]) != 1:
        outer = "first" if side == "left" else "last"
        raise ValueError(
            "tt_chain: expected cores [..., r_0, n_1, r_1], [..., r_1, n_2, r_2], ... with 1 for the "
            f"{outer} rank of a {side} chain, got shapes {[list(core.shape) for core in cores]}"
        )
    if side == "left":
        chain = cores[0]
        for core in cores[1:]:
            chain = _join(chain, core, order)
        return chain.squeeze(-3)
    chain = cores[-1]
    for core in reversed(cores[:-1]):
        chain = _join(core, chain, order)
    return chain.squeeze(-1)


def _join(a: Tensor, b: Tensor, order: str) -> Tensor:
    """Contract ``[..., r0, n, r1]`` and ``[..., r1, m, r2]`` to ``[..., r0, n m, r2]``."""
    return torch.einsum("...anb,...bmc->...anmc" if order == "C" else "...anb,...bmc->...amnc", a, b).flatten(-3, -2)


def column_blocks(C: Tensor, V: Tensor) -> Tensor:
    """Return ``[C_1 V | C_2 V | ...]``, the G of a layer whose output is several blocks (matrices, heads) side by side.

    Args:
        C: ``[..., n_blocks, r1, r2]``.
        V: ``[r2, d]``, the same for all blocks.

    Returns:
        ``[..., r1, n_blocks * d]``.
    """
    return torch.einsum("...nab,bd->...and", C, V).flatten(-2)


def row_blocks(U: Tensor, C: Tensor) -> Tensor:
    """Return ``[U C_1; U C_2; ...]``, the D of a layer whose input is several blocks stacked vertically.

    Args:
        U: ``[d, r1]``, the same for all blocks.
        C: ``[..., n_blocks, r1, r2]``.

    Returns:
        ``[..., n_blocks * d, r2]``.
    """
    return torch.einsum("da,...nab->...ndb", U, C).flatten(-3, -2)
