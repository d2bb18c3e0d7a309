"""Compute one linear layer for a batch in which each sample uses its own adapter, with a single call."""

import torch

from efft_kernels import tt_linear, tt_linear_grouped

torch.manual_seed(0)
x = torch.randn(5, 197, 64)  # [samples, tokens, d_in]
W, b = torch.randn(192, 64), torch.zeros(192)
D, G = torch.randn(3, 64, 8), torch.randn(3, 8, 192)  # three adapters
adapter = torch.tensor([2, 0, -1, 1, 2])  # the adapter of each sample; -1 means no adapter

y = tt_linear_grouped(x, W, b, D, G, adapter)
for sample, number in enumerate(adapter.tolist()):
    alone = tt_linear(x[sample], W, b, D[number], G[number]) if number >= 0 else x[sample] @ W.t() + b
    torch.testing.assert_close(y[sample], alone, rtol=1e-4, atol=1e-4)
print("every sample got its own adapter")
