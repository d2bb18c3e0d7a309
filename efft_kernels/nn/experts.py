"""Experts held as one three-dimensional parameter: which rows go to which expert, and the update of their matrices."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from efft_kernels._autocast import no_autocast
from efft_kernels.nn.expert_mm import expert_mm
from efft_kernels.nn.factors import Site, TTFactors
from efft_kernels.nn.linear import MergeLoss
from efft_kernels.nn.weights import is_plain
from efft_kernels.ops import tt_merge_


class Routing(NamedTuple):
    """Tokens sorted by the experts they go to: a row for every token and expert that the router chose for it.

    Attributes:
        order: ``[rows]``, the place of each row in the router's ``[tokens, k]``, flattened.
        tokens: ``[rows]``, the token of each row.
        experts: ``[rows]``, the expert of each row, ascending.
        offsets: int32 ``[experts]``, where the rows of each expert end.
    """

    order: Tensor
    tokens: Tensor
    experts: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, chosen: Tensor, n_experts: int) -> Routing:
        """The routing for the router's choice ``[tokens, k]`` of experts."""
        experts, order = torch.sort(chosen.reshape(-1), stable=True)
        each = torch.arange(n_experts, device=chosen.device, dtype=experts.dtype)
        offsets = torch.searchsorted(experts, each, right=True, out_int32=True)
        return cls(order, order // chosen.shape[-1], experts, offsets)

    def combine(self, y: Tensor, weights: Tensor) -> Tensor:
        """The rows ``y [rows, d]`` of each token, weighted by the router's ``weights [tokens, k]`` and summed
        ``[tokens, d]``."""
        weighted = y * weights.reshape(-1)[self.order].unsqueeze(-1)
        back = torch.empty_like(self.order).scatter_(0, self.order, torch.arange(len(y), device=y.device))
        return weighted[back].unflatten(0, weights.shape).sum(1)


class ExpertWeight:
    """The update of one parameter of a module, the matrices of its experts ``[experts, d_out, d_in]``.

    All experts share D, so that it multiplies every token once, whatever the number of experts it goes to. Each has
    its own core, and all cores share V: the update is ``(x D) C[e] V``, and no matrix of the size of an expert's is
    built. What multiplies by the parameter adds the update with :meth:`add_update`.

    Args:
        module, name: the parameter and the module that has it. It is frozen.
        factors, site: the part of a bank; a bank is referenced, and owned elsewhere.
        transposed: the parameter is stored as ``[experts, d_in, d_out]``.

    Attributes:
        enabled: False while the update is switched off.

    Raises:
        TypeError: the module has no such parameter of three dimensions, or it is quantised.
        ValueError: the site does not fit the parameter.
    """

    def __init__(
        self, module: nn.Module, name: str, factors: TTFactors, site: Site, *, transposed: bool = False
    ) -> None:
        weight = module._parameters.get(name)
        if weight is None or weight.dim() != 3 or not weight.is_floating_point() or not is_plain(weight):
            found = "none" if weight is None else f"a {type(weight).__name__} {list(weight.shape)} of {weight.dtype}"
            raise TypeError(
                f"{type(module).__name__}.{name}: expected a plain floating-point parameter [experts, d_out, d_in], "
                f"found {found}"
            )
        n_experts, rows, columns = weight.shape
        sizes = (rows, columns) if transposed else (columns, rows)
        if site.experts != n_experts or factors.features(site) != sizes:
            raise ValueError(
                f"{type(module).__name__}.{name}: {site} of this bank fits {site.experts} experts with (in_features, "
                f"out_features) = {factors.features(site)}, got {n_experts} with {sizes}"
            )
        weight.requires_grad_(False)
        self.module, self.name, self.transposed = module, name, transposed
        self.factors, self.site, self.binding = factors, site, factors.bind(site)
        self.enabled = True
        module.register_buffer(self._buffer, None, persistent=False)

    @property
    def _buffer(self) -> str:  # where the base weight is while the update is merged, so that it moves with the module
        return f"efft_base_{self.name}"

    @property
    def weight(self) -> nn.Parameter:
        """The stored parameter."""
        parameter: nn.Parameter = getattr(self.module, self.name)
        return parameter

    @property
    def base_weight(self) -> Tensor | None:
        """The parameter without the update, while that is merged."""
        base: Tensor | None = getattr(self.module, self._buffer)
        return base

    @property
    def merged(self) -> bool:
        """Whether the update is part of the parameter now."""
        return self.base_weight is not None

    @property
    def live(self) -> bool:
        """Whether the update has to be added to products with the parameter."""
        return self.enabled and not self.merged

    def matrices(self, weight: Tensor) -> Tensor:
        """``weight``, laid out like the parameter, as ``[experts, d_in, d_out]``: a view."""
        return weight if self.transposed else weight.transpose(1, 2)

    def add_update(self, y: Tensor, x: Tensor, offsets: Tensor, tokens: Tensor | None = None) -> Tensor:
        """``y`` plus the update of every expert times its rows.

        Args:
            y: ``[rows, d_out]``, the product with the parameter.
            x: ``[rows, d_in]``; with ``tokens`` instead ``[tokens, d_in]``, and row i is that of token ``tokens[i]``.
            offsets: see :func:`expert_mm`.

        Returns:
            ``[rows, d_out]`` in the dtype of ``y``, in which the update is computed. Differentiable in ``y``, ``x`` and
            the factors.
        """
        with no_autocast(x.device):
            D, C, V = (operand.to(y.dtype) for operand in self.factors.down_up(self.binding))
            h = x.to(y.dtype) @ D
            h = expert_mm(h if tokens is None else h[tokens], C, offsets)  # [rows, blocks * r']
            if self.site.blocks > 1 and self.site.interleaved:
                return y + (h.unflatten(1, (self.site.blocks, -1)) @ V).transpose(1, 2).flatten(1)
            return torch.addmm(y.reshape(-1, V.shape[1]), h.reshape(-1, V.shape[0]), V).view(y.shape)

    def evaluated(self) -> tuple[Tensor, Tensor]:
        """(D [d_in, r], G [experts, r, d_out]) as they are now and without dropout."""
        return self.factors.evaluated(self.site)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """The dense update, laid out like the parameter, in the factors' dtype, without dropout: for inspection."""
        D, G = self.evaluated()
        with no_autocast(D.device):
            return self.matrices(D @ G)

    @torch.no_grad()
    def merge(self, dequantize: bool = False) -> MergeLoss | None:
        """Add the update to the parameter, expert by expert in fp32 with one rounding, keeping the base weight so that
        unmerge is exact. ``dequantize`` is there for the sake of other weights: none of these is quantised.

        Returns what rounding cost; None if the update was merged already.
        """
        if self.merged:
            return None
        D, G = self.evaluated()
        kept = self.weight.detach().clone()
        wide = torch.promote_types(kept.dtype, D.dtype)
        sums = torch.zeros(3, dtype=torch.float64, device=kept.device)  # of squares: base, update, lost
        with no_autocast(D.device):
            for W, base, up in zip(self.matrices(self.weight.detach()), self.matrices(kept), G, strict=True):
                tt_merge_(W.t(), D, up)
                delta = D @ up
                lost = (W.to(wide) - base.to(wide)) - delta
                sums += torch.stack([part.to(wide).norm().double() ** 2 for part in (base, delta, lost)])
        setattr(self.module, self._buffer, kept)
        base_norm, size, error = sums.sqrt().tolist()
        return MergeLoss(size / base_norm if base_norm else float("inf"), error / size if size else 0.0)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back, bit for bit. Does nothing while the update is not merged."""
        if self.base_weight is None:
            return
        self.weight.copy_(self.base_weight)
        setattr(self.module, self._buffer, None)

    def release(self) -> None:
        """Unmerge, and leave nothing behind in the module."""
        self.unmerge()
        delattr(self.module, self._buffer)

    def __repr__(self) -> str:
        state = "".join(f", {word}" for word, true in (("merged", self.merged), ("disabled", not self.enabled)) if true)
        return f"{type(self).__name__}({self.name}, {self.factors.describe(self.site)}{state})"


def expert_linear(x: Tensor, W: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x[i] W[e] + bias[i]`` for the rows i of every expert e, in the dtype of ``W``.

    Args:
        x: ``[rows, d_in]``, sorted by expert.
        W: ``[experts, d_in, d_out]``.
        offsets: see :func:`expert_mm`.
        bias: ``[rows, d_out]`` or None.
    """
    with no_autocast(x.device):
        y = expert_mm(x.to(W.dtype), W, offsets)
        return y if bias is None else y + bias


__all__ = ["ExpertWeight", "Routing", "expert_linear"]
