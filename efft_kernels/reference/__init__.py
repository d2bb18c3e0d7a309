"""The specification: each op as plain differentiable torch, computed in fp32 (fp64 for fp64 inputs).

``<op>_bwd`` are its gradients as differentiable torch, for derivatives of derivatives.
"""

from efft_kernels.reference.tt_contract import tt_contract, tt_contract_bwd
from efft_kernels.reference.tt_gelu_linear import tt_gelu_linear, tt_gelu_linear_bwd
from efft_kernels.reference.tt_linear import tt_linear, tt_linear_bwd
from efft_kernels.reference.tt_linear_grouped import tt_linear_grouped, tt_linear_grouped_bwd
from efft_kernels.reference.tt_merge import tt_merge_
from efft_kernels.reference.tt_norm_linear import tt_norm_linear, tt_norm_linear_bwd

__all__ = [
    "tt_contract",
    "tt_contract_bwd",
    "tt_gelu_linear",
    "tt_gelu_linear_bwd",
    "tt_linear",
    "tt_linear_bwd",
    "tt_linear_grouped",
    "tt_linear_grouped_bwd",
    "tt_merge_",
    "tt_norm_linear",
    "tt_norm_linear_bwd",
]
