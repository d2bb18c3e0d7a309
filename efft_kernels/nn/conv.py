"""``EfftConv2d``: a frozen convolution with a tensor-train delta."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efft_kernels.nn.linear import AdaptedLayer
from efft_kernels.nn.weights import is_plain
from efft_kernels.ops import tt_linear


class EfftConv2d(AdaptedLayer, nn.Conv2d):
    """``y = conv(x; W) + b + conv(x; D) G`` with frozen ``W`` and ``b``; an ``nn.Conv2d``, see :class:`AdaptedLayer`.

    The matrix of a kernel ``[d_out, channels, kh, kw]`` is ``[d_out, channels * kh * kw]``, so D is a kernel with r
    outputs and G one of 1 x 1; the update is never built. A 1 x 1 convolution whose channels come last in memory is a
    linear layer, and computed by its kernels.
    """

    adapts = nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:  # [..., channels, height, width] -> [..., d_out, height', width']
        if not self.enabled or self.merged:
            return self._conv_forward(x, self.weight, self.bias)
        D, G = self.factors.down_up(self.binding)  # [channels * kh * kw, r], [r, d_out]
        if self._is_linear() and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return tt_linear(x.movedim(1, -1), self.weight.flatten(1), self.bias, D, G).movedim(-1, 1)
        down = D.to(x.dtype).t().reshape(-1, *self.weight.shape[1:])
        up = G.to(x.dtype).t()[..., None, None]
        h = self._conv_forward(x, down, None)
        return self._conv_forward(x, self.weight, self.bias) + F.conv2d(h, up)

    def delta_weight(self) -> Tensor:
        """The dense update ΔW, a kernel like the weight, in the factors' dtype, without dropout: for inspection."""
        return super().delta_weight().reshape(self.weight.shape)

    def _is_linear(self) -> bool:
        one = self.kernel_size == self.stride == (1, 1) and self.padding in ((0, 0), "valid", "same")
        return one and is_plain(self.weight)
