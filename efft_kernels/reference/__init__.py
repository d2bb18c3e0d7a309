"""The specification: each op as plain differentiable torch, computed in fp32 (fp64 for fp64 inputs)."""

from efft_kernels.reference.tt_contract import tt_contract
from efft_kernels.reference.tt_gelu_linear import tt_gelu_linear
from efft_kernels.reference.tt_linear import tt_linear
from efft_kernels.reference.tt_linear_grouped import tt_linear_grouped
from efft_kernels.reference.tt_merge import tt_merge_
from efft_kernels.reference.tt_norm_linear import tt_norm_linear

__all__ = ["tt_contract", "tt_gelu_linear", "tt_linear", "tt_linear_grouped", "tt_merge_", "tt_norm_linear"]
