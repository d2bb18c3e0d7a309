"""Kernels and layers for tensor-train fine-tuning of frozen linear layers.

- Ops: :func:`tt_linear`, its variants that include a preceding GELU (:func:`tt_gelu_linear`) or layer norm
  (:func:`tt_norm_linear`), its variant with one adapter per sample (:func:`tt_linear_grouped`), a whole MLP
  (:func:`tt_mlp`), :func:`tt_contract` and :func:`tt_merge_`.
- Layers: :class:`EfftLinear`, :class:`EfftConv2d` and similar classes, and :class:`TTFactors`, the module that owns the
  factors of many layers. A :class:`Site` is the part of the factors that one layer uses. Methods other than EFFT use
  :class:`FactorBank`, the base class of :class:`TTFactors`, and :func:`tt_chain`.
- Mixtures of experts: :class:`ExpertWeight`, :class:`Routing` and :func:`expert_linear`.
- Backends, the implementations of the ops: :mod:`efft_kernels.backends`.

``python -m efft_kernels`` reports the environment.
"""

from __future__ import annotations

import os
from pathlib import Path

from efft_kernels.backends import Backend, can_run, explain, use_backend
from efft_kernels.nn import (
    EfftConv1D,
    EfftConv1d,
    EfftConv2d,
    EfftConv3d,
    EfftEmbedding,
    EfftLinear,
    ExpertWeight,
    FactorBank,
    Routing,
    Site,
    TTFactors,
    expert_linear,
    tt_chain,
)
from efft_kernels.ops import (
    tt_contract,
    tt_gelu_linear,
    tt_linear,
    tt_linear_grouped,
    tt_merge_,
    tt_mlp,
    tt_norm_linear,
)

__version__ = "0.1.0"

if os.environ.get("EFFT_AUTOTUNE"):
    from efft_kernels.autotune import use_table

    use_table(Path(os.environ["EFFT_AUTOTUNE"]).expanduser())

__all__ = [
    "Backend",
    "EfftConv1D",
    "EfftConv1d",
    "EfftConv2d",
    "EfftConv3d",
    "EfftEmbedding",
    "EfftLinear",
    "ExpertWeight",
    "FactorBank",
    "Routing",
    "Site",
    "TTFactors",
    "__version__",
    "can_run",
    "expert_linear",
    "explain",
    "tt_chain",
    "tt_contract",
    "tt_gelu_linear",
    "tt_linear",
    "tt_linear_grouped",
    "tt_merge_",
    "tt_mlp",
    "tt_norm_linear",
    "use_backend",
]
