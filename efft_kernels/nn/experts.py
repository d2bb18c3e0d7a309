"""Adapt the experts of a mixture of experts, if one three-dimensional parameter stores the matrices of all experts.

:class:`Routing` sorts tokens by expert, and :class:`ExpertWeight` adds an update to the matrix of each expert. A
*router* chooses k experts for each token; a *row* is one pair of a token and one of its experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from efft_kernels._arguments import no_autocast
from efft_kernels.nn.expert_mm import expert_mm
from efft_kernels.nn.factors import Site, TTFactors
from efft_kernels.nn.frozen import stored_in
from efft_kernels.nn.parameter import AdaptedParameter, cannot_adapt_parameter
from efft_kernels.ops import tt_merge_

#: The storage of expert matrices in a parameter: ``[experts, d_out, d_in]`` or ``[experts, d_in, d_out]``.
EXPERT_VIEWS = ("experts", "experts transposed")


class Routing(NamedTuple):
    """Hold the order of the rows when they are sorted by expert, with tokens · k rows.

    Attributes:
        order: ``[rows]``, the index of each row in the router's choice ``[tokens, k]`` after flattening.
        tokens: ``[rows]``, the token of each row.
        experts: ``[rows]``, the expert of each row, ascending.
        offsets: int32 ``[experts]``, the end of each expert's rows.
    """

    order: Tensor
    tokens: Tensor
    experts: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, chosen: Tensor, n_experts: int) -> Routing:
        """Return the routing for the router's choice ``[tokens, k]`` of experts."""
        experts, order = torch.sort(chosen.reshape(-1), stable=True)
        each = torch.arange(n_experts, device=chosen.device, dtype=experts.dtype)
        offsets = torch.searchsorted(experts, each, right=True, out_int32=True)
        return cls(order, order // chosen.shape[-1], experts, offsets)

    def combine(self, y: Tensor, weights: Tensor) -> Tensor:
        """Sum the rows ``y [rows, d]`` of each token, weighted by ``weights [tokens, k]``, to ``[tokens, d]``."""
        weighted = y * weights.reshape(-1)[self.order].unsqueeze(-1)
        back = torch.empty_like(self.order).scatter_(0, self.order, torch.arange(len(y), device=y.device))
        return weighted[back].unflatten(0, weights.shape).sum(1)


class ExpertWeight(AdaptedParameter):
    """Adapt the matrices of all experts, which one parameter ``[experts, d_out, d_in]`` of a module stores.

    All experts share D. In a product whose input is the same for all experts of a token, D therefore multiplies each
    token once, for any number of experts. Each expert e has its own core C[e], and all experts share V. Expert e adds
    ``(x D) C[e] V`` to its output, and no matrix of the size of an expert's weight is built. Code that multiplies by
    the stored parameter adds the update with :meth:`add_update`. Code that reads the parameter in another way gets the
    effective weights of all experts, which include the updates. If such code multiplies by matrices
    ``[experts, d_in, d_out]`` with ``torch.bmm`` or ``matmul``, low-rank products add the update to the result. Any
    other use of the values builds a dense tensor.

    Args:
        module: the module that owns the parameter.
        name: the name of the parameter.
        factors: the bank.
        site: the part of the bank that the experts use.
        transposed: whether the parameter is stored as ``[experts, d_in, d_out]``.

    Raises:
        TypeError: the parameter is not a plain floating-point parameter with three dimensions, or is already adapted.
        ValueError: the sizes of the site and the parameter differ.
    """

    factors: TTFactors
    site: Site

    def __init__(
        self, module: nn.Module, name: str, factors: TTFactors, site: Site, *, transposed: bool = False
    ) -> None:
        reason = cannot_adapt_experts(module, name)
        if reason is not None:
            raise TypeError(f"{name} of {type(module).__name__}: {reason}")
        weight = stored_in(module, name)
        if site.experts != len(weight):
            raise ValueError(f"{name} of {type(module).__name__}: expected a site of {len(weight)} experts, got {site}")
        super().__init__(module, name, factors, site, EXPERT_VIEWS[transposed])

    def _sizes(self) -> tuple[int, int]:
        d_in, d_out = self.matrices(self.stored).shape[1:]
        return d_in, d_out

    @property
    def live(self) -> bool:
        """Whether the update must be added to products with the stored parameter."""
        return self.enabled and not self.merged

    def matrices(self, weight: Tensor) -> Tensor:
        """Convert ``weight`` between the parameter's layout and ``[experts, d_in, d_out]``, without a copy."""
        return weight if self.view == EXPERT_VIEWS[True] else weight.transpose(1, 2)

    def add_update(self, y: Tensor, x: Tensor, offsets: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Return ``y`` plus the product of every expert's rows with that expert's update.

        The rows are sorted by expert.

        Args:
            y: ``[rows, d_out]``, the product with the stored parameter.
            x: ``[rows, d_in]``, or ``[tokens, d_in]`` if ``tokens`` is passed.
            offsets: the end of each expert's rows (see :func:`expert_mm`).
            tokens: ``[rows]``, the token of each row, or None if ``x`` has one entry per row.

        Returns:
            ``[rows, d_out]`` in the dtype of ``y``, which is also the dtype of the computation. Differentiable with
            respect to ``y``, ``x`` and the factors.
        """
        with no_autocast(x.device):
            D, C, V = (operand.to(y.dtype) for operand in self.factors.down_up(self.binding))
            h = x.to(y.dtype) @ D
            h = expert_mm(h if tokens is None else h[tokens], C, offsets)  # [rows, blocks * r']
            if self.site.blocks > 1 and self.site.interleaved:
                return y + (h.unflatten(1, (self.site.blocks, -1)) @ V).transpose(1, 2).flatten(1)
            return torch.addmm(y.reshape(-1, V.shape[1]), h.reshape(-1, V.shape[0]), V).view(y.shape)

    def batched(self, x: Tensor, W: Tensor, D: Tensor, G: Tensor) -> Tensor | None:
        if x.dim() != 3 or self.view != EXPERT_VIEWS[True]:
            return None
        y = torch.bmm(x, W)
        with no_autocast(x.device):
            x, D, G = (operand.to(y.dtype) for operand in (x, D, G))
            return torch.baddbmm(y, x @ D, G)

    def update(self, D: Tensor, G: Tensor) -> Tensor:
        """Return the dense update of all experts in the parameter's shape, given D and G [experts, r, d_out]."""
        with no_autocast(D.device):
            return self.matrices(D @ G)

    def _add(self, W: Tensor, D: Tensor, G: Tensor) -> None:
        for matrix, up in zip(self.matrices(W), G, strict=True):
            tt_merge_(matrix.t(), D, up)


def cannot_adapt_experts(module: nn.Module, name: str) -> str | None:
    """Return None if an :class:`ExpertWeight` can adapt the parameter ``name`` of ``module``, else the reason."""
    reason = cannot_adapt_parameter(module, name, "convolution")  # this view allows any number of dimensions
    weight = module._parameters.get(name)
    if reason is None and weight is not None and (weight.dim() != 3 or not holds_numbers(weight)):
        return f"expected floating-point matrices [experts, d_out, d_in], got {list(weight.shape)} {weight.dtype}"
    return reason


def holds_numbers(weight: Tensor) -> bool:
    """Return whether a sum can be rounded to the dtype of ``weight``; dtypes of at most 8 bits would need a scale."""
    return weight.is_floating_point() and weight.element_size() > 1


def expert_linear(x: Tensor, W: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``x[i] W[e] + bias[i]`` for the rows i of every expert e, in the dtype of ``W``.

    Args:
        x: ``[rows, d_in]``, sorted by expert.
        W: ``[experts, d_in, d_out]``.
        offsets: the end of each expert's rows (see :func:`expert_mm`).
        bias: ``[rows, d_out]`` or None.
    """
    with no_autocast(x.device):
        y = expert_mm(x.to(W.dtype), W, offsets)
        return y if bias is None else y + bias


__all__ = ["ExpertWeight", "Routing", "expert_linear"]
