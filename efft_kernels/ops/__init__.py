"""The public ops. Each is an ordinary function: it validates, picks a backend and carries autograd."""

from efft_kernels.ops.tt_contract import tt_contract
from efft_kernels.ops.tt_linear import tt_linear
from efft_kernels.ops.tt_merge import tt_merge_

__all__ = ["tt_contract", "tt_linear", "tt_merge_"]
