"""Check that a compiled wheel imports and computes if only its run-time dependencies are installed."""

import torch

import efft
import efft_kernels
from efft_kernels import testing

inputs = testing.make_inputs("tt_linear", dtype=torch.float32)
compiled = efft_kernels.tt_linear(**inputs, backend="cpu")
torch.testing.assert_close(compiled, efft_kernels.tt_linear(**inputs, backend="reference"))

model = efft.apply(torch.nn.Sequential(torch.nn.Linear(8, 8)), efft.EfftConfig(rank=2, targets=["0"], head=[]))
model(torch.ones(3, 8)).sum().backward()
print(efft.__file__, efft_kernels.__version__)
