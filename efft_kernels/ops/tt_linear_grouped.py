"""Define ``tt_linear_grouped``, a frozen linear layer with a separate low-rank update per sample.

Three operators implement it. ``tt_linear_grouped`` returns only y and is used for inference.
``tt_linear_grouped_fwd``, which also returns h, and ``tt_linear_grouped_bwd`` are used for training. If each adapter
has its own bias, inference uses ``tt_linear_grouped_fwd`` too.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from efft_kernels import eager, reference
from efft_kernels._arguments import (
    autocast_bias,
    autocast_like_linear,
    check_dtypes,
    check_linear,
    check_shape,
    check_tensor,
    no_autocast,
    unless_wider,
)
from efft_kernels.backends import Backend, declare, resolve


def _fake(x: Tensor, W: Tensor, b: Tensor | None, D: Tensor, G: Tensor, adapter: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], W.shape[0])


def _fake_fwd(x: Tensor, W: Tensor, b: Tensor | None, D: Tensor, G: Tensor, adapter: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:2], W.shape[0]), x.new_empty(*x.shape[:2], D.shape[2])


def _fake_bwd(
    gy: Tensor,
    x: Tensor | None,
    W: Tensor | None,
    h: Tensor | None,
    D: Tensor,
    G: Tensor,
    adapter: Tensor,
    need_dx: bool,
    need_dD: bool,
    need_dG: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        gy.new_empty((*gy.shape[:2], D.shape[1]) if need_dx else 0),
        D.new_empty(D.shape if need_dD else 0),
        G.new_empty(G.shape if need_dG else 0),
        gy.new_empty((len(G), G.shape[2]) if need_db else 0, dtype=torch.promote_types(gy.dtype, torch.float32)),
    )


def _cuda_bwd(gy: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute dx with the compiled kernel of the forward pass, and the sums over tokens (dD, dG, db) with torch."""
    return eager.grouped_backward(_FORWARD[Backend.CUDA], gy, *rest)


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
_FORWARD = declare(
    "tt_linear_grouped_fwd",
    # As above. Also returns h [samples, tokens, r1], which is zero without an adapter. With the backend cpu, b may be
    # [n_adapters, d_out]: the bias of each adapter.
    "(Tensor x, Tensor W, Tensor? b, Tensor D, Tensor G, Tensor adapter) -> (Tensor y, Tensor h)",
    _fake_fwd,
    eager=eager.tt_linear_grouped_fwd,
    triton=_triton,
)
_BACKWARD = declare(
    "tt_linear_grouped_bwd",
    # gy [samples, tokens, d_out]. dD needs x, dx needs W, and dG needs h. A gradient that is not needed is returned
    # with 0 elements. db [n_adapters, d_out], the sum over the samples of each adapter, is in fp32 (fp64 for fp64).
    "(Tensor gy, Tensor? x, Tensor? W, Tensor? h, Tensor D, Tensor G, Tensor adapter, "
    "bool need_dx, bool need_dD, bool need_dG, bool need_db) -> (Tensor dx, Tensor dD, Tensor dG, Tensor db)",
    _fake_bwd,
    eager=eager.tt_linear_grouped_bwd,
    triton=_triton,
    cuda=_cuda_bwd,
)


def tt_linear_grouped(
    x: Tensor,  # [samples, tokens, d_in]
    W: Tensor,  # [d_out, d_in]
    b: Tensor | None,  # [d_out], or [n_adapters, d_out]
    D: Tensor,  # [n_adapters, d_in, r1]
    G: Tensor,  # [n_adapters, r1, d_out]
    adapter: Tensor,  # [samples]
    *,
    backend: str | Backend | None = None,
) -> Tensor:  # [samples, tokens, d_out]
    """Compute a linear layer plus each sample's own update, ``y[i] = x[i] Wᵀ + b + (x[i] D[a]) G[a]``, a = adapter[i].

    This op serves or trains many adapters of one frozen model in one batch. The result depends only on the factors of
    the adapters in the batch, and the gradients of all other adapters are zero.

    In training, the backend ``cpu`` returns for consecutive samples of one adapter exactly the results that
    :func:`tt_linear` returns for these samples alone. ``triton`` and ``cuda`` compute y and dx with their own kernels,
    and the sums over tokens with torch's products.

    Args:
        x: activations ``[samples, tokens, d_in]``, with any strides.
        W: weight ``[d_out, d_in]`` in the dtype of ``x``, cast like ``x`` under autocast.
        b: bias ``[d_out]``, or the bias of each adapter ``[n_adapters, d_out]`` (samples without an adapter then have
            no bias), or None. Its dtype is that of ``x``, or fp32 if ``x`` is in half precision.
        D: down factors of all adapters ``[n_adapters, d_in, r1]``, with any floating-point dtype that the backend
            supports. Pad adapters of lower rank with zeros.
        G: up factors ``[n_adapters, r1, d_out]``, with any floating-point dtype that the backend supports.
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
        RuntimeError: the requested backend cannot run this call, or the tensors are on different devices.
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
            torch._assert_async((adapter < D.shape[0]).all(), "tt_linear_grouped: an index in adapter is too large")
    elif adapter.device.type == "cpu" and adapter.numel() and int(adapter.max()) >= D.shape[0]:
        raise ValueError(f"tt_linear_grouped: there are {D.shape[0]} adapters, got index {int(adapter.max())}")
    own_bias = isinstance(b, Tensor) and b.dim() == 2
    check_linear("tt_linear_grouped", "x", x, W, None if own_bias else b, D[0], G[0])
    if b is not None and own_bias:
        check_shape("tt_linear_grouped", "b", b, (D.shape[0], W.shape[0]), "[n_adapters, d_out]")
    x, W = autocast_like_linear(x, W)
    b = autocast_bias(b)
    check_dtypes("tt_linear_grouped", "x", x.dtype, W=W, b=unless_wider(b, x.dtype))
    chosen = resolve("tt_linear_grouped", backend, x, W, b, D, G)
    if chosen is Backend.REFERENCE:
        return reference.tt_linear_grouped(x, W, b, D, G, adapter)
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, W, b, D, G))
    if differentiated or torch.autograd.forward_ad._current_level >= 0:
        y: Tensor = _TTLinearGrouped.apply(x, W, b, D, G, adapter, chosen)
        return y
    with no_autocast(x.device):
        if own_bias:
            return _forward(x, W, b, D, G, adapter, chosen)[0]
        return _IMPLEMENTATION[chosen](x, W, b, D, G, adapter)


def _forward(
    x: Tensor, W: Tensor, b: Tensor | None, D: Tensor, G: Tensor, adapter: Tensor, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Return y and h, with one bias for all adapters, one per adapter, or none."""
    if b is None or b.dim() == 1 or backend is Backend.CPU:
        return _FORWARD[backend](x, W, b, D, G, adapter)
    y, h = _FORWARD[backend](x, W, None, D, G, adapter)
    return eager.add_biases(y, b, adapter), h


class _TTLinearGrouped(torch.autograd.Function):
    """Define the autograd of tt_linear_grouped for all backends, with one registered operator per direction.

    If the backward pass will itself be differentiated, the reference computes it from the inputs, which are part of the
    graph (unlike the saved h).
    """

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
        with no_autocast(x.device):
            y, h = _forward(x, W, b, D, G, adapter, backend)
        x_or_none = x if need_dW or need_dD or need_dG else None
        ctx.save_for_backward(x_or_none, W if need_dx else None, h if need_dG else None, D, G, adapter)
        ctx.backend, ctx.bias = backend, None if b is None else (b.dtype, b.dim())
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, h, D, G, adapter = ctx.saved_tensors
        need_dx, need_dW, need_db, need_dD, need_dG = ctx.needs_input_grad[:5]
        own_bias = need_db and ctx.bias[1] == 2
        with no_autocast(gy.device):
            if torch.is_grad_enabled():  # a second derivative will follow
                of_factors = x if need_dD or need_dG else None
                dx, dD, dG, db = reference.tt_linear_grouped_bwd(gy, of_factors, W, D, G, adapter)
            else:
                needs = need_dx, need_dD, need_dG, own_bias
                dx, dD, dG, db = _BACKWARD[ctx.backend](gy, x, W, h, D, G, adapter, *needs)
            dW = gy.flatten(0, 1).t() @ x.flatten(0, 1) if need_dW else None
            if need_db and not own_bias:
                db = gy.sum((0, 1), dtype=torch.promote_types(gy.dtype, torch.float32))
        return (
            dx if need_dx else None,
            dW,
            db.to(ctx.bias[0]) if need_db else None,
            dD if need_dD else None,
            dG if need_dG else None,
            None,
            None,
        )
