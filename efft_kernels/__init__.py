"""Kernels and layers for tensor-train fine-tuning of frozen linear layers.

Ops: :func:`tt_linear`, :func:`tt_contract`, :func:`tt_merge_`. Layers: :class:`EfftLinear` and the bank of shared
factors, :class:`TTFactors`. Backends: :mod:`efft_kernels.backends`. ``python -m efft_kernels`` reports the environment.
"""

from efft_kernels.backends import Backend, can_run, explain, use_backend
from efft_kernels.nn import EfftLinear, Site, TTFactors
from efft_kernels.ops import tt_contract, tt_linear, tt_merge_

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "EfftLinear",
    "Site",
    "TTFactors",
    "__version__",
    "can_run",
    "explain",
    "tt_contract",
    "tt_linear",
    "tt_merge_",
    "use_backend",
]
