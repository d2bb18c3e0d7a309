"""Hand-written forward and backward on the vendor's matrix products: works on any device, needs no compiler."""

from efft_kernels.eager import tt_contract, tt_gelu_linear, tt_linear, tt_linear_grouped, tt_merge, tt_norm_linear

__all__ = ["tt_contract", "tt_gelu_linear", "tt_linear", "tt_linear_grouped", "tt_merge", "tt_norm_linear"]
