"""Define ``EfftConv1D`` (for the linear layers of GPT-2) and ``EfftEmbedding``, whose weights are ``[d_in, d_out]``.

D and G are the two factors of the update of the weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efft_kernels._arguments import no_autocast
from efft_kernels.nn.frozen import FrozenLayer, cannot_wrap, is_conv1d, is_plain, not_only_a_weight, stored_in
from efft_kernels.nn.linear import AdaptedLayer
from efft_kernels.ops import tt_linear

torch.fx.wrap("tt_linear")  # a traced graph contains tt_linear as one node


class EfftConv1D(AdaptedLayer):
    """Compute ``y = x W + b + (x D) G`` with frozen ``W [d_in, d_out]`` and ``b``, for a ``Conv1D`` of transformers.

    The class of each instance inherits from this class and from ``Conv1D``.
    """

    view = "transposed"

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        if isinstance(layer, FrozenLayer):
            return cannot_wrap(layer)
        if not is_conv1d(layer):
            return f"expected a Conv1D of transformers, got {type(layer).__name__}"
        if not is_plain(stored_in(layer, "weight")):
            return (
                f"the weight of this Conv1D is a {type(stored_in(layer, 'weight')).__name__}, not a plain dense tensor"
            )
        return not_only_a_weight(layer, next(kind for kind in type(layer).__mro__ if kind.__name__ == "Conv1D"))

    def forward(self, x: Tensor) -> Tensor:  # [..., d_in] -> [..., d_out]
        if not self.enabled or self.merged:
            return self.product(x)
        D, G = self.factors.down_up(self.binding)
        return tt_linear(x, stored_in(self, "weight").t(), self.bias, D, G)  # type: ignore[arg-type]

    __repr__ = nn.Module.__repr__  # the __repr__ of Conv1D does not show extra_repr

    def extra_repr(self) -> str:
        d_in, d_out = stored_in(self, "weight").shape
        return f"nf={d_out}, nx={d_in}, {self.describe()}"


class EfftEmbedding(AdaptedLayer, nn.Embedding):
    """Compute ``y = W[ids] + D[ids] G`` with frozen ``W [num, dim]``. This is an ``nn.Embedding``.

    Here d_in is num, and d_out is dim. The row of ``padding_idx`` has no update, just as it has no gradient in
    ``nn.Embedding``.
    """

    adapts = nn.Embedding
    view = "transposed"

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        reason = cannot_wrap(layer, nn.Embedding)
        if reason is not None:
            return reason
        embedding: Any = layer
        if embedding.max_norm is not None:
            return "an embedding with max_norm changes its weight in each call; expected max_norm=None"
        if embedding.sparse or embedding.scale_grad_by_freq:
            return "expected an embedding with dense gradients: sparse=False and scale_grad_by_freq=False"
        if not is_plain(embedding.weight):
            return f"the weight of this embedding is a {type(embedding.weight).__name__}, not a plain dense tensor"
        return None

    def forward(self, ids: Tensor) -> Tensor:  # [...] -> [..., dim]
        W = stored_in(self, "weight")
        y = F.embedding(ids, W, self.padding_idx)
        if not self.enabled or self.merged:
            return y
        D, G = self.factors.down_up(self.binding)
        h = F.embedding(ids, D)  # [..., r]
        if self.padding_idx is not None:
            h = h.masked_fill((ids == self.padding_idx)[..., None], 0)
        with no_autocast(y.device):  # autocast does not change the dtype of an embedding's output
            return y + (h @ G.to(h.dtype)).to(y.dtype)

    def update(self, D: Tensor, G: Tensor) -> Tensor:
        return super().update(without_padding(self, D), G)

    def evaluated(self) -> tuple[Tensor, Tensor]:
        D, G = super().evaluated()
        return without_padding(self, D), G


def without_padding(layer: nn.Module, D: Tensor) -> Tensor:
    """Return D ``[num, r]`` of an embedding, with zeros in the row of its ``padding_idx`` if it has one."""
    padding = getattr(layer, "padding_idx", None)
    return D if padding is None else D.index_fill(0, torch.tensor([padding], device=D.device), 0)
