"""Argument checks shared by the ops: a wrong call says what was expected, what came and what to do."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor


def check_tensor(op: str, name: str, argument: object) -> None:
    """Raise TypeError unless ``argument`` is a tensor."""
    if not isinstance(argument, Tensor):
        raise TypeError(
            f"{op}: {name} must be a torch.Tensor, got {type(argument).__name__}; torch.as_tensor makes one of a NumPy "
            "array or of numbers"
        )


def check_number(op: str, name: str, argument: object) -> None:
    """Raise TypeError unless ``argument`` is a real number."""
    if not isinstance(argument, (int, float)) and not isinstance(argument, Real):
        raise TypeError(f"{op}: {name} must be a number, got {type(argument).__name__}")


def check_shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...], symbols: str) -> None:
    """Raise ValueError unless ``tensor`` has exactly the ``expected`` shape, written ``symbols`` in the docs."""
    check_tensor(op, name, tensor)
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{op}: {name} must be {symbols} = {list(expected)}, got shape {list(tensor.shape)}")


def check_matrix(op: str, name: str, tensor: Tensor, symbols: str) -> None:
    """Raise ValueError unless ``tensor`` has two dimensions."""
    check_tensor(op, name, tensor)
    if tensor.dim() != 2:
        raise ValueError(f"{op}: {name} must be {symbols}, got shape {list(tensor.shape)}")


def check_linear(op: str, name: str, x: Tensor, W: Tensor, b: Tensor | None, D: Tensor, G: Tensor) -> None:
    """Raise ValueError unless ``x`` (called ``name``) [..., d_in] fits a linear layer and its delta."""
    check_tensor(op, name, x)
    check_delta(op, W, D, G)
    if x.dim() == 0 or x.shape[-1] != W.shape[1]:
        raise ValueError(f"{op}: {name} must be [..., d_in={W.shape[1]}], got shape {list(x.shape)}")
    if b is not None:
        check_shape(op, "b", b, (W.shape[0],), "[d_out]")


def linear_sizes(x: Tensor, W: Tensor, D: Tensor) -> tuple[int, int, int, int]:
    """(tokens, d_in, d_out, r1): what the choice of a backend depends on."""
    return math.prod(x.shape[:-1]), W.shape[1], W.shape[0], D.shape[1]


def check_dtypes(op: str, like: str, dtype: torch.dtype, **others: Tensor | None) -> None:
    """Raise ValueError unless all ``others`` have the ``dtype`` of the argument called ``like``."""
    got = {name: tensor.dtype for name, tensor in others.items() if tensor is not None}
    if any(other != dtype for other in got.values()):
        raise ValueError(
            f"{op}: {' and '.join(others)} must have the dtype of {like}, got {like} {dtype}, "
            f"{', '.join(f'{name} {other}' for name, other in got.items())}; cast one of them or use torch.autocast"
        )


def check_frozen(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError if a gradient would be recorded for one of ``tensors``."""
    trained = [name for name, t in tensors.items() if t is not None and t.requires_grad]
    if trained and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: {', '.join(trained)} must be frozen, got requires_grad=True; freeze it, or call the layers one by "
            "one with efft_kernels.tt_linear"
        )


def check_delta(op: str, W: Tensor, D: Tensor, G: Tensor) -> None:
    """Raise ValueError unless D G has the shape of Wᵀ."""
    check_matrix(op, "W", W, "[d_out, d_in]")
    check_matrix(op, "D", D, "[d_in, r1]")
    d_out, d_in = W.shape
    check_shape(op, "D", D, (d_in, D.shape[1]), "[d_in, r1]")
    check_shape(op, "G", G, (D.shape[1], d_out), "[r1, d_out]")
