"""Adapt ``nn.MultiheadAttention`` and ``nn.TransformerEncoder``, which read the weights of their projections."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efft_kernels.nn.adapted import AdaptedWeight
from efft_kernels.nn.frozen import stored_in
from efft_kernels.nn.parameter import AdaptedModule, adapted_weights_of, runs_for
from efft_kernels.ops import tt_linear


@runs_for(nn.MultiheadAttention.forward)
class EfftMultiheadAttention(AdaptedModule):
    """Serve as an additional base class of an ``nn.MultiheadAttention`` while it is adapted.

    torch's own class reads the weights of its projections and never calls layers for them. This class computes the
    projections with ``tt_linear``, so no dense update is built. The parameters ``in_proj_weight`` ``[3 d, d]`` (or
    ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight``) and the layer ``out_proj`` may be adapted. While the
    updates of all of them are merged or disabled, torch's own forward method runs, including its fast paths.
    """

    def forward(
        self,
        query: Tensor,  # [targets, batch, d], with batch_first [batch, targets, d], unbatched [targets, d]
        key: Tensor,  # shaped like query, with sources instead of targets
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the result of ``nn.MultiheadAttention.forward``, with the updates of the projections.

        Raises:
            NotImplementedError: the inputs are nested tensors, which only torch's own fast path supports.
            RuntimeError: the shapes of inputs or masks do not match, a mask is neither boolean nor floating-point, or
                ``is_causal`` is set without ``attn_mask``.
        """
        mha: Any = self
        if not self._is_active():
            return super().forward(  # type: ignore[misc]
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
        if query.is_nested or key.is_nested or value.is_nested:
            raise NotImplementedError(
                "an adapted nn.MultiheadAttention does not accept nested tensors: pad the inputs (in "
                "nn.TransformerEncoder, set enable_nested_tensor=False), or merge the update first"
            )
        batched = query.dim() == 3
        if not query.dim() == key.dim() == value.dim() or query.dim() not in (2, 3):
            raise RuntimeError(
                "expected query, key and value of 3 dimensions, or of 2 without a batch, got shapes "
                f"{[list(t.shape) for t in (query, key, value)]}"
            )
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "expected attn_mask with is_causal=True, because is_causal is only a hint about the mask, got None"
            )
        q, k, v = self._projected(query, key, value)
        if not batched:
            q, k, v = (t.unsqueeze(0) for t in (q, k, v))
        elif not mha.batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))  # all [batch, positions, d] from here on
        samples, targets, _ = q.shape
        if is_causal and key_padding_mask is None and not need_weights:
            mask = None  # is_causal describes the whole mask
        else:
            mask = self._merged_mask(attn_mask, key_padding_mask, samples, targets, k.shape[1], query.dtype)
            is_causal = is_causal and key_padding_mask is None
        k, v, mask = self._lengthened(k, v, mask)
        q, k, v = (t.unflatten(-1, (mha.num_heads, mha.head_dim)).transpose(1, 2) for t in (q, k, v))
        dropout = mha.dropout if mha.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / mha.head_dim)) @ k.transpose(-2, -1)  # [batch, heads, targets, sources]
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            weights = F.dropout(weights, dropout) if dropout > 0 else weights
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        y = y.transpose(1, 2).flatten(2)  # [batch, targets, d]
        if not batched:
            y, weights = y.squeeze(0), None if weights is None else weights.squeeze(0)
        elif not mha.batch_first:
            y = y.transpose(0, 1)
        return mha.out_proj(y), weights

    def _is_active(self) -> bool:
        out = self._modules["out_proj"]  # type: ignore[attr-defined]
        return any(_counts(weight) for module in (self, out) for weight in adapted_weights_of(module))

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the projected query, key and value. One product projects all inputs that are the same tensor."""
        mha: Any = self
        bias = mha.in_proj_bias
        if not mha._qkv_same_embed_dim:
            biases = (None, None, None) if bias is None else bias.chunk(3)
            names, inputs = ("q_proj_weight", "k_proj_weight", "v_proj_weight"), (query, key, value)
            q, k, v = (self._product(n, t, slice(None), b) for n, t, b in zip(names, inputs, biases, strict=True))
            return q, k, v
        d, name = mha.embed_dim, "in_proj_weight"
        if query is key and key is value:
            return self._product(name, query, slice(None), bias).chunk(3, -1)  # type: ignore[return-value]

        def part(t: Tensor, first: int, last: int) -> Tensor:
            rows = slice(first * d, last * d)
            return self._product(name, t, rows, None if bias is None else bias[rows])

        if key is value:
            return part(query, 0, 1), *part(key, 1, 3).chunk(2, -1)  # type: ignore[return-value]
        return part(query, 0, 1), part(key, 1, 2), part(value, 2, 3)

    def _product(self, name: str, x: Tensor, rows: slice, b: Tensor | None) -> Tensor:
        """Multiply ``x`` by the given rows of a projection's weight, including their update."""
        W = stored_in(self, name)[rows]  # type: ignore[arg-type]
        adapted = self.adapted_parameters.get(name)
        if adapted is None or not _counts(adapted):
            return F.linear(x, W, b)
        D, G = adapted.factors.down_up(adapted.binding)
        return tt_linear(x, W, b, D, G[:, rows])

    def _merged_mask(
        self,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        samples: int,
        targets: int,
        sources: int,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """Return the mask to add to the scores [batch, heads, targets, sources], in a shape that broadcasts to them."""
        heads: int = self.num_heads  # type: ignore[attr-defined]
        mask = _added(attn_mask, dtype)
        if mask is not None:
            expected = (targets, sources) if mask.dim() == 2 else (samples * heads, targets, sources)
            if mask.shape != expected:
                raise RuntimeError(f"attn_mask: expected shape {list(expected)}, got {list(mask.shape)}")
            mask = mask if mask.dim() == 2 else mask.view(samples, heads, targets, sources)
        padding = _added(key_padding_mask, dtype)
        if padding is None:
            return mask
        if padding.numel() != samples * sources:
            raise RuntimeError(f"key_padding_mask: expected shape {[samples, sources]}, got {list(padding.shape)}")
        padding = padding.view(samples, 1, 1, sources)
        return padding if mask is None else mask + padding

    def _lengthened(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append the entries that ``add_bias_kv`` and ``add_zero_attn`` add to keys and values [batch, sources, d].

        The mask is padded with zeros, so that it does not hide these entries.
        """
        mha: Any = self
        samples = k.shape[0]
        if mha.bias_k is not None:
            k = torch.cat([k, mha.bias_k.expand(samples, -1, -1)], 1)
            v = torch.cat([v, mha.bias_v.expand(samples, -1, -1)], 1)
        if mha.add_zero_attn:
            k, v = (torch.cat([t, t.new_zeros(samples, 1, t.shape[-1])], 1) for t in (k, v))
        added = (mha.bias_k is not None) + bool(mha.add_zero_attn)
        return k, v, mask if mask is None or added == 0 else F.pad(mask, (0, added))


@runs_for(nn.TransformerEncoder.forward)
class EfftTransformerEncoder(AdaptedModule):
    """Serve as an additional base class of an ``nn.TransformerEncoder`` while weights inside it are adapted.

    While an update is applied, the encoder does not pack padded batches into nested tensors. The encoder's layers
    accept nested tensors only in torch's fast path, which cannot add an update.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the result of ``nn.TransformerEncoder.forward``, without nested tensors while an update is applied."""
        encoder: Any = self
        before = encoder.use_nested_tensor
        active = any(_counts(weight) for module in encoder.modules() for weight in adapted_weights_of(module))
        encoder.use_nested_tensor = before and not active
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            encoder.use_nested_tensor = before


def _counts(weight: AdaptedWeight) -> bool:
    return weight.enabled and not weight.merged


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return ``mask`` as numbers to add to the scores. A boolean mask becomes minus infinity where it is True."""
    if mask is None or mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise RuntimeError(f"expected a mask of booleans or floating-point numbers, got {mask.dtype}")
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
