"""Layers on top of the ops: banks of shared factors, and adapted layers that each use one part of a bank."""

from efft_kernels.nn.attention import EfftMultiheadAttention
from efft_kernels.nn.bank import FactorBank
from efft_kernels.nn.conv import EfftConv1d, EfftConv2d, EfftConv3d
from efft_kernels.nn.experts import ExpertWeight, Routing, expert_linear
from efft_kernels.nn.factors import Site, TTFactors
from efft_kernels.nn.linear import EfftLinear
from efft_kernels.nn.operands import tt_chain
from efft_kernels.nn.transposed import EfftConv1D, EfftEmbedding

__all__ = [
    "EfftConv1D",
    "EfftConv1d",
    "EfftConv2d",
    "EfftConv3d",
    "EfftEmbedding",
    "EfftLinear",
    "EfftMultiheadAttention",
    "ExpertWeight",
    "FactorBank",
    "Routing",
    "Site",
    "TTFactors",
    "expert_linear",
    "tt_chain",
]
