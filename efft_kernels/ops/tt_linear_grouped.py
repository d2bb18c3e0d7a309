"""Define ``tt_linear_grouped``, a frozen linear layer with a separate low-rank update per sample, for serving."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from efft_kernels import eager, reference
from efft_kernels._arguments import (
    autocast_like_linear,
    check_dtypes,
    check_linear,
    check_shape,
    check_tensor,
    no_autocast,
)
from efft_kernels.backends import Backend, declare, resolve


def _fake(x: Tensor, W: Tensor, b: Tensor | None, D: Tensor, G: Tensor, adapter: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], W.shape[0])


def _triton() -> ModuleType:
    from efft_kernels.triton import tt_linear_grouped

    return tt_linear_grouped


_IMPLEMENTATION = declare(
    "tt_linear_grouped",
    # x [samples, tokens, d_in], D [n_adapters, d_in, r1], G [n_adapters, r1, d_out], adapter [samples] (int64, negative
    # for none) -> [samples, tokens, d_out]
    "(Tensor x, Tensor W, Tensor? b, Tensor D, Tensor G, Tensor adapter) -> Tensor",
    _fake,
    eager=eager.tt_linear_grouped,
    triton=_triton,
)


def tt_linear_grouped(
    x: Tensor,  # [samples, tokens, d_in]
    W: Tensor,  # [d_out, d_in]
    b: Tensor | None,  # [d_out]
    D: Tensor,  # [n_adapters, d_in, r1]
    G: Tensor,  # [n_adapters, r1, d_out]
    adapter: Tensor,  # [samples]
    *,
    backend: str | Backend | None = None,
) -> Tensor:  # [samples, tokens, d_out]
    """Compute a linear layer plus each sample's own update, ``y[i] = x[i] Wᵀ + b + (x[i] D[a]) G[a]``, a = adapter[i].

    This op serves many adapters of one frozen model in one batch, and reads only the factors of the adapters in the
    batch. It is intended for inference: in every backend, plain matrix products compute the gradients.

    Args:
        x: activations ``[samples, tokens, d_in]``, with any strides.
        W: weight ``[d_out, d_in]`` in the dtype of ``x``, cast like ``x`` under autocast.
        b: bias ``[d_out]`` or None, in the dtype of ``x``, cast like ``x`` under autocast.
        D: down factors of all adapters ``[n_adapters, d_in, r1]``, with any floating-point dtype. Pad adapters of lower
            rank with zeros.
        G: up factors ``[n_adapters, r1, d_out]``, with any floating-point dtype.
        adapter: int64 ``[samples]``, the adapter of each sample, or a negative number for no adapter. On the CPU, an
            index of ``n_adapters`` or more is an error. On a GPU, where a check would have to wait for the device, the
            output for that sample is NaN.
        backend: the backend to use (see :mod:`efft_kernels.backends`).

    Returns:
        ``y [samples, tokens, d_out]`` in the dtype of ``x`` (the autocast dtype under autocast). Differentiable any
        number of times.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: shapes or dtypes do not match, or an index is out of range.
        RuntimeError: the requested backend cannot run this call.
    """
    for name, tensor in (("x", x), ("D", D), ("G", G)):
        check_tensor("tt_linear_grouped", name, tensor)
    if x.dim() != 3 or D.dim() != 3 or G.dim() != 3 or not D.shape[0] == G.shape[0] > 0:
        raise ValueError(
            "tt_linear_grouped: expected x [samples, tokens, d_in], D [n_adapters >= 1, d_in, r1] and "
            f"G [n_adapters, r1, d_out], got shapes {list(x.shape)}, {list(D.shape)} and {list(G.shape)}"
        )
    check_shape("tt_linear_grouped", "adapter", adapter, (x.shape[0],), "[samples]")
    if adapter.dtype != torch.int64:
        raise ValueError(f"tt_linear_grouped: adapter must be int64, got {adapter.dtype}")
    if adapter.device != x.device:
        raise RuntimeError(f"tt_linear_grouped: all tensors must be on one device, got {x.device} and {adapter.device}")
    if torch.compiler.is_compiling():  # the values are not known at compile time
        if adapter.device.type == "cpu":
            torch._assert_async((adapter < D.shape[0]).all(), "tt_linear_grouped: an index beyond the adapters")
    elif adapter.device.type == "cpu" and adapter.numel() and int(adapter.max()) >= D.shape[0]:
        raise ValueError(f"tt_linear_grouped: there are {D.shape[0]} adapters, got index {int(adapter.max())}")
    check_linear("tt_linear_grouped", "x", x, W, b, D[0], G[0])
    x, W, b = autocast_like_linear(x, W, b)
    check_dtypes("tt_linear_grouped", "x", x.dtype, W=W, b=b)
    chosen = resolve("tt_linear_grouped", backend, x, W, b, D, G)
    if chosen is Backend.REFERENCE:
        return reference.tt_linear_grouped(x, W, b, D, G, adapter)
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, W, b, D, G))
    if differentiated or torch.autograd.forward_ad._current_level >= 0:
        return _TTLinearGrouped.apply(x, W, b, D, G, adapter, chosen)
    with no_autocast(x.device):
        return _IMPLEMENTATION[chosen](x, W, b, D, G, adapter)


class _TTLinearGrouped(torch.autograd.Function):
    """Define the autograd of tt_linear_grouped for all backends; the reference computes the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        D: Tensor,
        G: Tensor,
        adapter: Tensor,
        backend: Backend,
    ) -> Tensor:
        need_dx, need_dW, _, need_dD, need_dG = ctx.needs_input_grad[:5]
        ctx.save_for_backward(x if need_dW or need_dD or need_dG else None, W if need_dx else None, D, G, adapter)
        with no_autocast(x.device):
            y: Tensor = _IMPLEMENTATION[backend](x, W, b, D, G, adapter)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, D, G, adapter = ctx.saved_tensors
        _, need_dW, need_db, need_dD, need_dG = ctx.needs_input_grad[:5]
        with no_autocast(gy.device):
            of_factors = x if need_dD or need_dG else None
            dx, dD, dG = reference.tt_linear_grouped_bwd(gy, of_factors, W, D, G, adapter)
            dW = gy.flatten(0, 1).t() @ x.flatten(0, 1) if need_dW else None
            db = gy.sum((0, 1)) if need_db else None
        return dx, dW, db, dD if need_dD else None, dG if need_dG else None, None, None
