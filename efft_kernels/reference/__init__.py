"""The specification: each op as plain differentiable torch, computed in fp32 (fp64 for fp64 inputs)."""

from efft_kernels.reference.tt_contract import tt_contract
from efft_kernels.reference.tt_linear import tt_linear
from efft_kernels.reference.tt_merge import tt_merge_

__all__ = ["tt_contract", "tt_linear", "tt_merge_"]
