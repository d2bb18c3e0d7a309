"""Adapt a single layer, and use the same op for another method."""

import torch
from torch import nn

from efft_kernels import EfftLinear, tt_linear

torch.manual_seed(0)
x = torch.randn(2, 197, 64)

# This layer is a fused qkv projection with its own factors. Its three cores share the product of x and U.
layer = EfftLinear.from_linear(nn.Linear(64, 192), rank=8, n_cores=3)
print(layer)
layer(x).sum().backward()

# LoRA uses the same op, with A and B instead of composed factors.
W, b = torch.randn(192, 64), torch.zeros(192)
A, B = torch.randn(64, 8, requires_grad=True), torch.zeros(8, 192, requires_grad=True)
y = tt_linear(x, W, b, A, B)  # y = x Wᵀ + b + (x A) B
y.sum().backward()
torch.testing.assert_close(y, x @ W.t() + b)
print("gradient of B:", B.grad.norm().item())
