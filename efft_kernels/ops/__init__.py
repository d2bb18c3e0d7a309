"""Define the public ops: ordinary functions that check arguments, choose a backend and record the autograd graph.

An op calls *operators*, functions that are registered with torch. The file of an op also declares these operators:
their schemas, their fake kernels (which compute only shapes and dtypes), and the Python functions that implement them.
The compiled backends register their implementations when their libraries are loaded.

W and b are the weight and the bias of a linear layer, and the update of the layer is D G, the product of two factors.
"""

from __future__ import annotations

from efft_kernels.ops.tt_contract import tt_contract
from efft_kernels.ops.tt_gelu_linear import tt_gelu_linear
from efft_kernels.ops.tt_linear import tt_linear
from efft_kernels.ops.tt_linear_grouped import tt_linear_grouped
from efft_kernels.ops.tt_merge import tt_merge_
from efft_kernels.ops.tt_mlp import tt_mlp
from efft_kernels.ops.tt_norm_linear import tt_norm_linear

__all__ = ["tt_contract", "tt_gelu_linear", "tt_linear", "tt_linear_grouped", "tt_merge_", "tt_mlp", "tt_norm_linear"]
