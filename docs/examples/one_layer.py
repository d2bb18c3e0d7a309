"""One adapted layer, and another tensor-train method on the same ops."""

import torch
from torch import nn

from efft_kernels import EfftLinear, tt_linear

torch.manual_seed(0)
x = torch.randn(2, 197, 64)

# A fused qkv projection with factors of its own: three cores, one h.
layer = EfftLinear.from_linear(nn.Linear(64, 192), rank=8, n_cores=3)
print(layer)
layer(x).sum().backward()

# LoRA is the same op without cores; so is any chain with one bond between the input's and the output's side.
W, b = torch.randn(192, 64), torch.zeros(192)
A, B = torch.randn(64, 8, requires_grad=True), torch.zeros(8, 192, requires_grad=True)
y = tt_linear(x, W, b, A, B)  # y = x Wᵀ + b + (x A) B
y.sum().backward()
torch.testing.assert_close(y, x @ W.t() + b)
print("gradient of B:", B.grad.norm().item())
