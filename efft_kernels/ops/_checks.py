"""Argument checks shared by the ops: a wrong call says what was expected, what came and what to do."""

from __future__ import annotations

from torch import Tensor


def check_shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...], symbols: str) -> None:
    """Raise ValueError unless ``tensor`` has exactly the ``expected`` shape, written ``symbols`` in the docs."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{op}: {name} must be {symbols} = {list(expected)}, got shape {list(tensor.shape)}")


def check_matrix(op: str, name: str, tensor: Tensor, symbols: str) -> None:
    """Raise ValueError unless ``tensor`` has two dimensions."""
    if tensor.dim() != 2:
        raise ValueError(f"{op}: {name} must be {symbols}, got shape {list(tensor.shape)}")


def check_delta(op: str, W: Tensor, D: Tensor, G: Tensor) -> None:
    """Raise ValueError unless D G has the shape of Wᵀ."""
    check_matrix(op, "W", W, "[d_out, d_in]")
    check_matrix(op, "D", D, "[d_in, r1]")
    d_out, d_in = W.shape
    check_shape(op, "D", D, (d_in, D.shape[1]), "[d_in, r1]")
    check_shape(op, "G", G, (D.shape[1], d_out), "[r1, d_out]")
