"""Compute ``tt_mlp`` from the functions of a backend for single layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Layers(NamedTuple):
    """Hold the functions of a backend for one layer, from which :func:`mlp_forward` and :func:`mlp_backward` compute.

    The attributes have the names and arguments of the functions in :mod:`efft_kernels.eager`. A backward function may
    return one other object in the place of dD, dG and db. The result of :func:`mlp_backward` then contains this object.
    """

    tt_linear_fwd: Callable[..., tuple[Tensor, Tensor]]
    tt_linear_bwd: Callable[..., tuple[Any, ...]]
    tt_norm_linear_fwd: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    tt_norm_linear_bwd: Callable[..., tuple[Any, ...]]
    tt_gelu_linear_fwd: Callable[..., tuple[Tensor, Tensor]]
    tt_gelu_linear_bwd: Callable[..., tuple[Any, ...]]


def mlp_forward(
    layers: Layers,
    x: Tensor,  # [tokens, d_in]
    gamma: Tensor | None,  # [d_in]
    beta: Tensor | None,  # [d_in]
    eps: float | None,
    W1: Tensor,  # [d_hidden, d_in]
    b1: Tensor | None,  # [d_hidden]
    D1: Tensor,  # [d_in, r1]
    G1: Tensor,  # [r1, d_hidden]
    W2: Tensor,  # [d_out, d_hidden]
    b2: Tensor | None,  # [d_out]
    D2: Tensor,  # [d_hidden, r1]
    G2: Tensor,  # [r1, d_out]
    approximate: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute tt_mlp one layer after the other with the functions of a backend.

    Returns:
        y ``[tokens, d_out]``, z ``[tokens, d_hidden]``, h1 and h2 ``[tokens, r1]``, and the norm's mean and rstd
        ``[tokens]``, which have 0 elements if ``eps`` is None.
    """
    if eps is None:
        z, h1 = layers.tt_linear_fwd(x, W1, b1, D1, G1)
        mean, rstd = (_empty(x, wide=True) for _ in range(2))
    else:
        z, h1, mean, rstd = layers.tt_norm_linear_fwd(x, gamma, beta, eps, W1, b1, D1, G1)
    y, h2 = layers.tt_gelu_linear_fwd(z, W2, b2, D2, G2, approximate)
    return y, z, h1, h2, mean, rstd


def mlp_backward(
    layers: Layers,
    gy: Tensor,  # [tokens, d_out]
    x: Tensor,  # [tokens, d_in]
    z: Tensor,  # [tokens, d_hidden]
    gamma: Tensor | None,  # [d_in]
    beta: Tensor | None,  # [d_in]
    eps: float | None,
    mean: Tensor,  # [tokens]
    rstd: Tensor,  # [tokens]
    W1: Tensor | None,  # [d_hidden, d_in]
    W2: Tensor | None,  # [d_out, d_hidden]
    h1: Tensor | None,  # [tokens, r1]
    h2: Tensor | None,  # [tokens, r1]
    D1: Tensor,  # [d_in, r1]
    G1: Tensor,  # [r1, d_hidden]
    D2: Tensor,  # [d_hidden, r1]
    G2: Tensor,  # [r1, d_out]
    approximate: str,
    need_dx: bool,
    need_dD1: bool,
    need_dG1: bool,
    need_db1: bool,
    need_dD2: bool,
    need_dG2: bool,
    need_db2: bool,
    need_dgamma: bool,
    need_dbeta: bool,
) -> tuple[Any, ...]:
    """Compute dx, dD1, dG1, db1, dD2, dG2, db2, dgamma and dbeta, one layer after the other."""
    first = need_dx, need_dD1, need_dG1, need_db1, need_dgamma, need_dbeta
    second = need_dD2, need_dG2, need_db2
    dz, *of_second = layers.tt_gelu_linear_bwd(gy, z, W2, h2, D2, G2, approximate, any(first), *second)
    dgamma, dbeta = (_empty(x if like is None else like) for like in (gamma, beta))
    of_first: Iterable[Any]
    if not any(first):
        of_first = _empty(x), *(_empty(like, wide=True) for like in (D1, G1, z))
    elif eps is None:
        of_first = layers.tt_linear_bwd(dz, x if need_dD1 else None, W1, h1, D1, G1, *first[:4])
    else:
        *of_first, dgamma, dbeta = layers.tt_norm_linear_bwd(
            dz, x, gamma, beta, eps, mean, rstd, W1, h1, D1, G1, *first
        )
    return *of_first, *of_second, dgamma, dbeta


def _empty(like: Tensor, wide: bool = False) -> Tensor:
    """Return a tensor with 0 elements in the dtype of ``like``, or at least in fp32 if ``wide``."""
    return like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32) if wide else like.dtype)
