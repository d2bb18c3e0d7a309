"""``tt_linear_grouped``: one frozen linear layer with another low-rank delta for every sample, for serving."""

from __future__ import annotations

import torch
from torch import Tensor

from efft_kernels import reference
from efft_kernels._autocast import autocast_like_linear, no_autocast
from efft_kernels.backends import Backend, resolve
from efft_kernels.ops._checks import check_dtypes, check_linear, check_shape, check_tensor
from efft_kernels.ops._schemas import overloads

_IMPLEMENTATION = overloads("tt_linear_grouped")


@torch.no_grad()
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
    """Linear layer plus each sample's own delta: ``y[i] = x[i] Wᵀ + b + (x[i] D[a]) G[a]`` with ``a = adapter[i]``.

    One batch, one frozen model, many adapters: only the factors of the adapters in the batch are read. For inference:
    no gradient is recorded.

    Args:
        x: activations ``[samples, tokens, d_in]``, any strides.
        W, b: weight ``[d_out, d_in]`` and bias ``[d_out]`` or None, in the dtype of ``x``, cast like it under
            autocast.
        D: down factors of all adapters ``[n_adapters, d_in, r1]``, any floating dtype; pad adapters of lower rank with
            zeros.
        G: up factors ``[n_adapters, r1, d_out]``, likewise.
        adapter: int64 ``[samples]``, which adapter a sample uses; negative for none. That every index is less than
            ``n_adapters`` is checked on the CPU only: on a GPU the check would wait for it.
        backend: see :mod:`efft_kernels.backends`.

    Returns:
        ``y [samples, tokens, d_out]`` in the dtype of ``x`` (the autocast dtype under autocast).

    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes, dtypes or indices do not fit together.
        RuntimeError: the backend asked for cannot run this call.
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
    if torch.compiler.is_compiling():  # the values are not known yet
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
    with no_autocast(x.device):
        return _IMPLEMENTATION[chosen](x, W, b, D, G, adapter)
