"""Define ``EfftConv1d``, ``EfftConv2d`` and ``EfftConv3d``: frozen convolutions with a tensor-train update.

``conv(x; K)`` denotes the convolution of x with the kernel K, with the stride, padding and dilation of the layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from efft_kernels._arguments import autocast_dtype
from efft_kernels.nn.frozen import is_plain, stored_in
from efft_kernels.nn.linear import AdaptedLayer
from efft_kernels.ops import tt_linear


class _EfftConv(AdaptedLayer):
    """Compute ``y = conv(x; W) + b + conv(x; D) G`` with frozen ``W`` and ``b``.

    The matrix of a kernel ``[d_out, channels, *kernel_size]`` is ``[d_out, channels * prod(kernel_size)]``. Therefore D
    is a kernel with r outputs, G is a kernel with one position, and the dense update is never built. A convolution with
    one kernel position, stride 1, no padding and a channels-last input is computed as a linear layer. A grouped
    convolution builds the dense update of its kernel (see :meth:`_in_groups`).
    """

    view = "convolution"

    def forward(self, x: Tensor) -> Tensor:  # [..., channels, *positions] -> [..., d_out, *positions']
        conv: Any = self
        W, b = stored_in(self, "weight"), conv.bias
        if not self.enabled or self.merged:
            return conv._conv_forward(x, W, b)
        D, G = self.factors.down_up(self.binding)  # [channels / groups * prod(kernel_size), r], [r, d_out]
        if conv.groups > 1:
            return self._in_groups(x, W, D, G)
        if self._is_linear() and isinstance(x, Tensor) and x.dim() == W.dim():  # torch.fx passes a proxy for x
            last = x.movedim(1, -1)
            if last.is_contiguous():
                return tt_linear(last, W.flatten(1), b, D, G).movedim(-1, 1)
        down = D.to(x.dtype).t().reshape(-1, *W.shape[1:])
        up = G.to(x.dtype).t().reshape(-1, G.shape[0], *(1 for _ in W.shape[2:]))
        h = conv._conv_forward(x, down, None)
        return conv._conv_forward(x, W, b) + _AT_EACH_POSITION[W.dim()](h, up)

    def _in_groups(self, x: Tensor, W: Tensor, D: Tensor, G: Tensor) -> Tensor:
        """Convolve with the dense sum of the kernel and its update.

        In a grouped (or depthwise) convolution, D would be a kernel with r outputs for each group, although the layer
        itself has only d_out / groups outputs per group. The low-rank form would cost more arithmetic and memory than
        the layer itself. The kernel and its update are tiny compared with the activations. In dtypes smaller than fp32,
        rounding the sum would lose the update, so the update is convolved separately.
        """
        conv: Any = self
        if (autocast_dtype(x.device) or x.dtype).itemsize < 4:
            y, update = conv._conv_forward(x, W, conv.bias), self.update(D, G).to(x.dtype)
            return y + conv._conv_forward(x, update, None)
        return conv._conv_forward(x, self.summed(W, D, G), conv.bias)

    def _is_linear(self) -> bool:
        conv: Any = self
        one = all(size == 1 for size in (*conv.kernel_size, *conv.stride))
        still = conv.padding in ("valid", "same") or not any(conv.padding)
        return one and still and is_plain(stored_in(self, "weight"))


_AT_EACH_POSITION = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}
"""The function that convolves with a one-position kernel, by the number of dimensions of the kernel."""


class EfftConv1d(_EfftConv, nn.Conv1d):
    """Compute ``y = conv(x; W) + b + conv(x; D) G`` with frozen ``W`` and ``b``. This is an ``nn.Conv1d``."""

    adapts = nn.Conv1d


class EfftConv2d(_EfftConv, nn.Conv2d):
    """Compute ``y = conv(x; W) + b + conv(x; D) G`` with frozen ``W`` and ``b``. This is an ``nn.Conv2d``."""

    adapts = nn.Conv2d


class EfftConv3d(_EfftConv, nn.Conv3d):
    """Compute ``y = conv(x; W) + b + conv(x; D) G`` with frozen ``W`` and ``b``. This is an ``nn.Conv3d``."""

    adapts = nn.Conv3d
