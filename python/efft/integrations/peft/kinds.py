"""Apply the update ``(D G)ᵀ`` of a matrix ``[d_out, d_in]`` to each kind of layer that peft adapts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from efft_kernels.nn.adapted import add_update_, from_matrix, view_of
from efft_kernels.nn.transposed import without_padding

_CONVOLUTIONS = {nn.Conv1d: torch.conv1d, nn.Conv2d: torch.conv2d, nn.Conv3d: torch.conv3d}
_KINDS = (nn.Linear, Conv1D, nn.Embedding, *_CONVOLUTIONS)


def why_not(layer: nn.Module) -> str | None:
    """Return the reason why a layer under peft cannot have an update, or None if it can have one."""
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "it is read by its nn.MultiheadAttention and never called"
    return None if isinstance(layer, _KINDS) else f"it is of type {type(layer).__name__}"


def is_linear(layer: nn.Module) -> bool:
    """Return whether the layer multiplies by one matrix, in either memory layout."""
    return isinstance(layer, (nn.Linear, Conv1D))


def sizes(layer: Any) -> tuple[int, int]:
    """Return (in_features, out_features) as peft defines them. For a convolution they are the numbers of channels."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    return (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_channels, layer.out_channels)


def dense(layer: Any, D: Tensor, G: Tensor) -> Tensor:
    """Return the update in the shape of the layer's weight, from D ``[d_in, r]`` and G ``[r, d_out]``."""
    return from_matrix((without_padding(layer, D) @ G).t(), view_of(layer), layer.weight.shape)


def merge_(layer: Any, D: Tensor, G: Tensor) -> None:
    """Add the update to the layer's weight in place, in fp32 with one rounding."""
    add_update_(layer.weight, view_of(layer), without_padding(layer, D), G)


def beside(layer: Any, x: Tensor, D: Tensor, G: Tensor, y: Tensor) -> Tensor:
    """Return the term that the update adds to the output ``y`` of the layer for the input ``x``.

    The term has the device and dtype of ``y``.
    """
    x = x.to(y.device)
    D, G = D.to(y.device, y.dtype), G.to(y.device, y.dtype)
    if isinstance(layer, nn.Embedding):
        h = F.embedding(x, without_padding(layer, D)) @ G
        return h * torch.as_tensor(getattr(layer, "embed_scale", 1.0)).to(h)  # Gemma's embeddings scale their output
    x = x.to(y.dtype)
    if is_linear(layer):
        return (x @ D) @ G
    shape = layer.weight.shape
    if layer.groups > 1:  # applying D to each group would cost more than the dense kernel, which is small
        grouped: Tensor = layer._conv_forward(x, (D @ G).t().reshape(shape), None)
        return grouped
    h = layer._conv_forward(x, D.t().reshape(-1, *shape[1:]), None)
    at_each_position = next(conv for kind, conv in _CONVOLUTIONS.items() if isinstance(layer, kind))
    return at_each_position(h, G.t().reshape(-1, G.shape[0], *(1 for _ in shape[2:])))
