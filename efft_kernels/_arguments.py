"""Check the arguments of ops, cast them under autocast, and flatten their leading dimensions.

The error for a wrong call states what was expected, what was passed, and what to do. The functions that run "inside an
operator" are called by functions that are registered with torch as operators, below autograd.

In this module, ``W`` and ``b`` are the weight and the bias of a linear layer. The update of the layer is ``D G``, the
product of two factors. A "token" is one row of the input after all leading dimensions are flattened into one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def check_tensor(op: str, name: str, argument: object) -> None:
    """Raise TypeError unless ``argument`` is a tensor."""
    if not isinstance(argument, Tensor):
        raise TypeError(
            f"{op}: {name} must be a torch.Tensor, got {type(argument).__name__}; convert a NumPy array or "
            "numbers with torch.as_tensor"
        )


def check_number(op: str, name: str, argument: object) -> None:
    """Raise TypeError unless ``argument`` is a real number."""
    if not isinstance(argument, (int, float)) and not isinstance(argument, Real):
        raise TypeError(f"{op}: {name} must be a number, got {type(argument).__name__}")


def check_shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...], symbols: str) -> None:
    """Raise ValueError unless ``tensor`` has exactly the shape ``expected``.

    The message shows this shape in symbols (``symbols``, such as "[d_in, r1]") and in numbers.
    """
    check_tensor(op, name, tensor)
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{op}: {name} must be {symbols} = {list(expected)}, got shape {list(tensor.shape)}")


def check_matrix(op: str, name: str, tensor: Tensor, symbols: str) -> None:
    """Raise ValueError unless ``tensor`` has two dimensions. The message calls the expected shape ``symbols``."""
    check_tensor(op, name, tensor)
    if tensor.dim() != 2:
        raise ValueError(f"{op}: {name} must be {symbols}, got shape {list(tensor.shape)}")


def check_linear(
    op: str, name: str, x: Tensor, W: Tensor, b: Tensor | None, D: Tensor, G: Tensor, *, layer: str = ""
) -> None:
    """Raise ValueError unless ``x`` [..., d_in] matches a linear layer and its update.

    ``name`` is the name of the op's argument ``x``, for the message. ``layer`` is appended to the names of the other
    arguments, for an op with several layers.
    """
    check_tensor(op, name, x)
    check_layer(op, W, b, D, G, layer)
    if x.dim() == 0 or x.shape[-1] != W.shape[1]:
        raise ValueError(f"{op}: {name} must be [..., d_in={W.shape[1]}], got shape {list(x.shape)}")


def check_layer(op: str, W: Tensor, b: Tensor | None, D: Tensor, G: Tensor, layer: str = "") -> None:
    """Raise ValueError unless the parameters of a linear layer and of its update match. ``layer`` ends their names."""
    check_delta(op, W, D, G, layer)
    if b is not None:
        check_shape(op, f"b{layer}", b, (W.shape[0],), "[d_out]")


def linear_sizes(x: Tensor, W: Tensor, D: Tensor) -> tuple[int, int, int, int]:
    """Return (tokens, d_in, d_out, r1), the sizes on which the choice of a backend depends."""
    return math.prod(x.shape[:-1]), W.shape[1], W.shape[0], D.shape[1]


def check_dtypes(op: str, like: str, dtype: torch.dtype, **others: Tensor | None) -> None:
    """Raise ValueError unless all ``others`` that are not None have ``dtype``, the dtype of the argument ``like``."""
    got = {name: tensor.dtype for name, tensor in others.items() if tensor is not None}
    if any(other != dtype for other in got.values()):
        raise ValueError(
            f"{op}: {' and '.join(others)} must have the dtype of {like}, got {like} {dtype}, "
            f"{', '.join(f'{name} {other}' for name, other in got.items())}; cast one of them or use torch.autocast"
        )


def check_norm(op: str, x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> None:
    """Raise ValueError unless the parameters of a layer norm over the last dimension of ``x`` match ``x``."""
    for name, parameter in (("gamma", gamma), ("beta", beta)):
        if parameter is not None:
            check_shape(op, name, parameter, (x.shape[-1],), "[d_in]")
    if gamma is not None and beta is not None and gamma.dtype != beta.dtype:
        raise ValueError(f"{op}: gamma and beta must have the same dtype, got {gamma.dtype} and {beta.dtype}")


def check_approximate(op: str, approximate: str) -> None:
    """Raise ValueError unless ``approximate`` names a GELU of ``torch.nn.functional.gelu``."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{op}: approximate must be 'none' or 'tanh', got {approximate!r}")


def check_frozen(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError if a gradient would be recorded for one of ``tensors``."""
    trained = [name for name, t in tensors.items() if t is not None and t.requires_grad]
    if trained and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: {', '.join(trained)} must be frozen, got requires_grad=True; freeze it, or call the layers one by "
            "one with efft_kernels.tt_linear"
        )


def check_delta(op: str, W: Tensor, D: Tensor, G: Tensor, layer: str = "") -> None:
    """Raise ValueError unless D G has the shape of Wᵀ. ``layer`` is appended to the names of the arguments."""
    check_matrix(op, f"W{layer}", W, "[d_out, d_in]")
    check_matrix(op, f"D{layer}", D, "[d_in, r1]")
    d_out, d_in = W.shape
    check_shape(op, f"D{layer}", D, (d_in, D.shape[1]), "[d_in, r1]")
    check_shape(op, f"G{layer}", G, (D.shape[1], d_out), "[r1, d_out]")


# The functions below query autocast by the name of the device type, because torch.amp.is_autocast_available causes a
# graph break in torch.compile with torch 2.10. The meta device has no autocast.


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype to which autocast casts on ``device``; None if autocast is off or does not exist there."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def autocast_like_linear(first: Tensor, *others: Tensor | None) -> Any:
    """Cast tensors on one device as autocast casts the arguments of ``F.linear``. Tensors in fp64 stay unchanged."""
    dtype = autocast_dtype(first.device)
    if dtype is None:
        return first, *others
    return [t if t is None or t.dtype in (dtype, torch.float64) else t.to(dtype) for t in (first, *others)]


def autocast_bias(b: Tensor | None) -> Tensor | None:
    """Cast the bias of a linear layer as autocast casts it, unless it is in fp32.

    Every backend accepts a bias in fp32 with a weight in any dtype. The gradient of such a bias is not rounded to the
    weight's dtype.
    """
    if b is None or b.dtype == torch.float32:
        return b
    dtype = autocast_dtype(b.device)
    return b if dtype is None or b.dtype in (dtype, torch.float64) else b.to(dtype)


def unless_wider(b: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the bias if its dtype must be equal to ``dtype``, else None.

    The dtype of an fp32 bias may differ from ``dtype`` if ``dtype`` is a half precision.
    """
    return None if b is not None and b.dtype == torch.float32 and dtype.itemsize == 2 else b


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which autocast is off on ``device``."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return _UNCHANGED
    if torch.compiler.is_compiling() or torch._C._is_torch_function_mode_enabled():  # such a mode may trace the context
        return torch.autocast(device.type, enabled=False)
    return _AutocastOff(device.type)


class _AutocastOff:
    """Switch autocast off on one type of device, in a fraction of the time that ``torch.autocast`` takes.

    Autocast must be on when the context is entered.
    """

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self._device_type, False)

    def __exit__(self, *_: object) -> None:
        torch.set_autocast_enabled(self._device_type, True)


_UNCHANGED = nullcontext()


def flatten_tokens(tensor: Tensor) -> Tensor:
    """Reshape ``tensor`` [..., d] to [tokens, d] inside an autograd function, where this adds no node to the graph.

    Save ``tensor`` itself for the backward pass, not the result, which is a view that was made without gradients. If
    the view were saved, autograd would report an in-place change with a less helpful message, and a second derivative
    would not reach ``tensor``.
    """
    if tensor.dim() == 2:
        return tensor
    # Size.numel() would turn sizes that are symbols during an export into constants.
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def rows_of(tensor: Tensor) -> Tensor:
    """Reshape ``tensor`` [..., d] to [tokens, d] inside an operator, if possible with one call of the dispatcher."""
    if tensor.dim() == 2:
        return tensor
    shape = math.prod(tensor.shape[:-1]), tensor.shape[-1]
    return tensor.view(shape) if tensor.is_contiguous() else tensor.reshape(shape)


def unflatten_tokens(tensor: Tensor, leading: Sequence[int]) -> Tensor:
    """Reshape ``tensor`` [tokens, d], which the op created and nothing else uses, to [*leading, d].

    This does not use ``view``, because autograd forbids in-place changes of a view that a forward method returned.
    """
    if len(leading) == 1:
        return tensor
    return torch.ops.aten._unsafe_view.default(tensor, (*leading, tensor.shape[-1]))


def transposed(matrix: Tensor) -> Tensor:
    """Return the transpose of ``matrix`` as a view, inside an operator.

    This calls the dispatcher once, whereas ``t()`` calls it three times.
    """
    rows, columns = matrix.shape
    return matrix.as_strided((columns, rows), matrix.stride()[::-1])


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor`` in ``dtype``, inside an operator and with few calls of the dispatcher.

    If the tensor already has this dtype, nothing is called. Otherwise a contiguous tensor is copied into a new tensor,
    which calls the dispatcher twice; ``to`` would call it four times.
    """
    if tensor.dtype == dtype:
        return tensor
    if tensor.is_contiguous():
        return torch.empty(tensor.shape, dtype=dtype, device=tensor.device).copy_(tensor)
    return tensor.to(dtype)
