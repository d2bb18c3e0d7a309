"""Implement TensLoRA (arXiv 2509.19391): Tucker decompositions of updates stacked along heads, matrices and blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from efft.config import is_size
from efft.methods.base import BlockBank, Blocks, HeadedConfig, Layer, heads_of, zeros
from efft_kernels.nn.bank import take

_TENSORS = ("att", "qkv", "depth", "att_qkv", "att_depth", "qkv_depth", "att_qkv_depth")


class TensLoRABank(BlockBank):
    """Hold Tucker tensors whose modes (dimensions) are the input, the output and those that ``config.tensor`` names.

    ``config.tensor`` names one or more of heads (att), matrices (qkv) and blocks (depth). If the blocks are not a mode,
    each block has its own tensors, and X is the number of blocks; otherwise X is 1. If the matrices are not a mode,
    each matrix of a block has its own tensor, and Y is the number of matrices; otherwise Y is 1.

    The core is ``[X, Y, r_in, r_out, r_heads, r_matrices, r_blocks]``, where the rank of a missing mode is 1. It starts
    at zero. The factors ``[X, Y, size, rank]`` start orthogonal (V is transposed). Each tensor has prod(ranks) plus the
    sum of size times rank parameters.
    """

    def __init__(self, config: TensLoRAConfig, layers: list[Layer], **kw: Any) -> None:
        super().__init__(config, layers, **kw)
        modes = config.tensor.split("_")
        self.heads = heads_of(config.heads, layers, self.d) if "att" in modes else 1
        sizes = {"att": self.heads, "qkv": self.n_matrices, "depth": self.n_blocks}
        tensors = [1 if mode in modes else sizes[mode] for mode in ("depth", "qkv")]  # X, Y
        ranks = dict(zip(("in", "out", *modes), config.ranks or [config.rank] * (2 + len(modes)), strict=True))
        self.core = zeros(*tensors, *(ranks.get(mode, 1) for mode in ("in", "out", "att", "qkv", "depth")), **kw)
        self.U = _orthogonal(*tensors, self.d, ranks["in"], **kw)
        self.V = _orthogonal(*tensors, ranks["out"], self.d // self.heads, **kw)
        self.modes = nn.ParameterDict({mode: _orthogonal(*tensors, sizes[mode], ranks[mode], **kw) for mode in modes})

    def factors(self) -> tuple[Tensor, ...]:
        """Return U ``[n_blocks, n_matrices, d, r_in]`` and s C V ``[n_blocks, n_matrices, r_in, d]``."""
        C: Tensor = self.core
        V: Tensor = self.V
        depth, qkv, att = (self.modes.get(mode) for mode in ("depth", "qkv", "att"))
        C = C.squeeze(-1) if depth is None else torch.einsum("yabhml,yxl->xyabhm", C[0], depth[0])
        C = C.squeeze(-1) if qkv is None else torch.einsum("xabhm,xym->xyabh", C[:, 0], qkv[:, 0])
        if att is not None:  # [X, Y, r_out, r_heads, heads, d / heads]
            V = torch.einsum("xynh,xybc->xybhnc", att, V).flatten(-2)
        G = C.flatten(-2) @ V.reshape(*V.shape[:2], -1, self.d)
        return self.U.expand(self.n_blocks, self.n_matrices, -1, -1), self.scale * G

    def operands(self, factors: tuple[Tensor, ...], like: Blocks, blocks: list[int]) -> tuple[Tensor, Tensor]:
        """Return D and G. Matrices with different U or different inputs have their own columns of D and rows of G."""
        U, G = (take(factor[:, like.first : like.last], 0, blocks) for factor in factors)
        if like.rows:
            return _diagonal(U), G.flatten(1, 2)
        if "qkv" in self.modes:
            return U[:, 0], G.transpose(1, 2).flatten(2)
        return U.transpose(1, 2).flatten(2), _diagonal(G)


@dataclass
class TensLoRAConfig(HeadedConfig):
    """Configure the tensor alternatives to LoRA, which use the Tucker decomposition.

    The columns of a head are adjacent, as in the attention. In the authors' code, a head has every H-th column.
    """

    method = "tenslora"
    paper = "2509.19391"
    bank = TensLoRABank

    tensor: Literal["att", "qkv", "depth", "att_qkv", "att_depth", "qkv_depth", "att_qkv_depth"] = "qkv_depth"
    """The modes in addition to input and output: heads (att), matrices of a block (qkv), blocks (depth)."""

    ranks: list[int] | None = None
    """One rank per mode, in the order input, output, att, qkv, depth. With None, all modes have the rank ``rank``."""

    targets: str | list[str] = "mhsa"
    """The same as in the other methods. The authors adapt q, k and v."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(self.tensor in _TENSORS, "tensor", f"one of {_TENSORS}", self.tensor)
        n = 2 + len(self.tensor.split("_"))
        given = self.ranks if isinstance(self.ranks, (list, tuple)) else []
        ok = self.ranks is None or (len(given) == n and all(map(is_size, given)))
        self._check(ok, "ranks", f"None or {n} integers, each a rank, for tensor {self.tensor!r}", self.ranks)


def _orthogonal(*shape: int, **kw: Any) -> nn.Parameter:
    stack = nn.Parameter(torch.empty(shape, **kw))
    for matrix in stack.detach().flatten(0, 1):
        nn.init.orthogonal_(matrix)
    return stack


def _diagonal(matrices: Tensor) -> Tensor:
    """Convert ``[l, n, p, q]`` to block-diagonal matrices ``[l, n p, n q]``."""
    n = matrices.shape[1]
    eye = torch.eye(n, dtype=matrices.dtype, device=matrices.device)
    return torch.einsum("lnpq,nk->lnpkq", matrices, eye).flatten(3).flatten(1, 2)
