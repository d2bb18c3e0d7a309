"""Compute EFFT in the dense form of the paper's public code, as an oracle that uses no code of this project.

Every update is built as a matrix, ΔW = U C_i V, and multiplied separately from the frozen weight. This implementation
follows the description of the method: q, k and v are three products that are concatenated, o acts on the output of the
attention, fc2 uses the transposed matrix, s is a constant multiplier, and dropout applies to the factors. The dropout
masks are drawn three times per block and pass: once for q, k, v and o, once for fc1, and once for fc2.

A tensor train consists of U, V and n cores C_i. It has the storage layout of the paper: all cores are in one tensor,
with the index of the core last (ViT, ``[r1, r2, n]``) or first (Swin, ``[n, r1, r2]``). The frozen model is a plain
model, and forward hooks add the updates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Kept(NamedTuple):
    """Hold the dropout masks of one draw, already scaled by 1/(1-p)."""

    U: Tensor  # [d_in, r1]
    C: Sequence[Tensor]  # one mask [r1, r2] for each core that the draw serves
    V: Tensor  # [r2, d_out]


#: A function that returns the masks for the index of a block and a place in it. The places are "mhsa", "fc1" and "fc2"
#: in EFFT2, and "qkvo", "fc1" and "fc2" in EFFT1.
Draw = Callable[[int, str], Kept]


@dataclass
class Train:
    """Hold U [d_in, r1], V [r2, d_out] and all cores in one tensor, with the index of the core last or first."""

    U: Tensor
    C: Tensor
    V: Tensor
    layout: str = "last"

    def dense(self, core: int, kept: Kept | None = None, of_draw: int = 0) -> Tensor:  # [d_in, d_out]
        """Return U C_core V, with the masks ``kept`` if they are given. This core has the mask ``kept.C[of_draw]``."""
        U, V = self.U, self.V
        C = self.C[..., core] if self.layout == "last" else self.C[core]
        if kept is not None:
            U, C, V = U * kept.U, C * kept.C[of_draw], V * kept.V
        return U @ C @ V


def attach_efft2(
    blocks: Sequence[nn.Module],
    mhsa: Train,
    ffn: Train,
    s: tuple[float, float],
    *,
    per_block: bool,
    draw: Draw | None = None,
) -> None:
    """Add EFFT2 to the blocks of a ViT or of one stage of a Swin.

    With ``per_block``, block l uses cores 4l..4l+3 of ``mhsa`` and cores 2l and 2l+1 of ``ffn``. Otherwise, all blocks
    share cores 0..3 of ``mhsa`` and cores 0 and 1 of ``ffn``. ``s`` holds the scales of the two tensor trains.
    """
    for index, block in enumerate(blocks):
        first = 4 * index if per_block else 0
        kept = None if draw is None else draw(index, "mhsa")
        q, k, v, o = (mhsa.dense(first + i, kept, i) for i in range(4))
        _attach_attention(block, q, k, v, o, s[0])
        first = 2 * index if per_block else 0
        fc1 = ffn.dense(first, None if draw is None else draw(index, "fc1"))
        fc2 = ffn.dense(first + 1, None if draw is None else draw(index, "fc2"))
        _attach_mlp(block, fc1, fc2, s[1])


def attach_efft1(blocks: Sequence[nn.Module], joint: Train, s: float, *, draw: Draw | None = None) -> None:
    """Add EFFT1, in which block l uses cores 3l, 3l+1 and 3l+2.

    They yield the updates of [Wq|Wk|Wv|Wo], of fc1, and of fc2 (transposed), each as a d x 4d matrix.
    """
    for index, block in enumerate(blocks):
        qkvo, fc1, fc2 = (
            joint.dense(3 * index + i, None if draw is None else draw(index, place))
            for i, place in enumerate(("qkvo", "fc1", "fc2"))
        )
        _attach_attention(block, *qkvo.chunk(4, dim=1), s)
        _attach_mlp(block, fc1, fc2, s)


def _attach_attention(block: nn.Module, q: Tensor, k: Tensor, v: Tensor, o: Tensor, s: float) -> None:
    _add(block.attn.qkv, lambda x: torch.cat((x @ q, x @ k, x @ v), dim=-1) * s)
    _add(block.attn.proj, lambda x: (x @ o) * s)


def _attach_mlp(block: nn.Module, fc1: Tensor, fc2: Tensor, s: float) -> None:
    _add(block.mlp.fc1, lambda x: (x @ fc1) * s)
    _add(block.mlp.fc2, lambda x: (x @ fc2.transpose(0, 1)) * s)


def _add(linear: nn.Module, update: Callable[[Tensor], Tensor]) -> None:
    linear.register_forward_hook(lambda _, args, output: output + update(args[0]))
