"""Define the layers of a backbone that several adapted models share in training (:class:`efft.SharedBackbone`).

A *pass* is one forward pass of the backbone with a batch of the samples of several models. A *part* of the batch
consists of the samples of one model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efft_kernels import tt_linear_grouped
from efft_kernels.nn.effective import in_backward
from efft_kernels.nn.frozen import dequantized, is_plain, stored_in
from efft_kernels.nn.linear import AdaptedLayer, frozen_linear, multiplies_plainly
from efft_kernels.nn.pooled import Layout, PooledDelta, Selection, place_of


@dataclass
class Parts:
    """Describe the batch of the running pass.

    Attributes:
        names: the models whose samples are in the batch, in the order of their parts.
        sizes: the number of samples of each model.
        numbers: int64 ``[samples]``, the position in ``names`` of each sample's model.
        each: int64 ``[models]``, the numbers 0, 1, ..., if all parts have the same size; else None.
        padded: the outputs of heads whose widths differ between the models. Each entry consists of the output, padded
            to the largest width, and the widths of all models.
    """

    names: Sequence[str]
    sizes: Sequence[int]
    numbers: Tensor
    each: Tensor | None
    padded: list[tuple[Tensor, Sequence[int]]] = field(default_factory=list)


Running = ContextVar[Parts | None]
"""The parts of the running pass; None outside of a pass."""


class JointDelta(PooledDelta):
    """Compute a frozen linear layer for all parts of a batch, each with the update and the bias of its own model.

    Args:
        linear: the frozen layer.
        running: the parts of the running pass.
        layers: the adapted layers of the models, by the names of the models.
    """

    def __init__(self, linear: nn.Linear, running: Running, layers: Mapping[str, AdaptedLayer]) -> None:
        super().__init__(linear, ContextVar[Selection | None]("unused", default=None))
        self.running = running
        # A plain dictionary does not register the layers as submodules.
        self.layers = dict(layers)
        biases = [layer._parameters.get("bias") for layer in layers.values()]
        self.has_own_bias = any(bias is not None and bias.requires_grad for bias in biases)
        if self.has_own_bias and not is_plain(linear.weight):
            raise ValueError(f"expected a plain weight next to a trained bias, got a {type(linear.weight).__name__}")
        self.probing = False  # True while a pass of the base model detects the order of the samples

    def forward(self, x: Tensor) -> Tensor:  # [..., in_features] -> [..., out_features]
        if not self.probing:
            self.selection()  # raises outside of a pass
        return super().forward(x)

    def uses_base(self) -> bool:
        return self.running.get() is None and (self.probing or not in_backward())

    def selection(self) -> Selection:
        parts = self.running.get()
        if parts is None:
            raise RuntimeError(
                "a layer of an efft.SharedBackbone ran outside of its forward pass. Activation checkpointing does "
                "this in the backward pass: switch it off, or train the models one by one"
            )
        return Selection(parts.numbers, None)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return D ``[models, in_features, r]`` and G ``[models, r, out_features]`` of the running pass."""
        layers = self._active()
        pairs = [layer.pair() for layer in layers]
        rank = max(D.shape[1] for D, _ in pairs)  # lower ranks are padded with zeros
        D = torch.stack([F.pad(D, (0, rank - D.shape[1])) for D, _ in pairs])
        return D, torch.stack([F.pad(G, (0, 0, 0, rank - G.shape[0])) for _, G in pairs])

    def one_each(self, x: Tensor, slots: Tensor, b: Tensor | None = None, *, own_bias: bool = True) -> Tensor:
        parts = self.running.get()
        assert parts is not None
        samples, rows = x.shape[:2]
        if parts.each is not None:  # if each model has equally many samples, treat them as one long sample
            x, slots = x.reshape(len(parts.names), -1, x.shape[-1]), parts.each
        D, G = self.factors()
        W = stored_in(self, "weight")
        if multiplies_plainly(self, W):
            if own_bias:
                own = self.has_own_bias
                b = torch.stack([layer.bias for layer in self._active()]) if own else self._stored_bias()
            y = tt_linear_grouped(x, W, b, D, G, slots)
        else:
            h = torch.bmm(x, D[slots].to(x.dtype))
            y = frozen_linear(self, x) if own_bias else F.linear(x, dequantized(W), b)
            y = y + torch.bmm(h, G[slots].to(x.dtype))
        return y.reshape(samples, rows, -1)

    def _active(self) -> list[Any]:
        parts = self.running.get()
        assert parts is not None
        return [self.layers[name] for name in parts.names]


class Each(nn.Module):
    """Call the module of each model with that model's part of the batch, and concatenate the outputs.

    Outputs whose last dimension differs (heads with different numbers of classes) are padded with zeros.

    Args:
        running: the parts of the running pass.
        modules: the modules, by the names of the models. They are not registered as submodules.
    """

    def __init__(self, running: Running, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.running, self.own = running, dict(modules)
        self.layouts: dict[int, Layout] = {}
        self.usual: frozenset[int] = frozenset()
        self.probing = False

    def __getattr__(self, name: str) -> Any:
        """Return an attribute that is equal in all modules, such as the width of a norm.

        Raises:
            AttributeError: the modules have no such attribute.
            RuntimeError: the attribute is a tensor, or it differs.
        """
        own: dict[str, Any] | None = self.__dict__.get("own")
        if own is None or name in self._parameters or name in self._buffers or name in self._modules:
            return super().__getattr__(name)
        values = [getattr(module, name) for module in own.values()]
        if any(isinstance(value, (Tensor, nn.Module)) or value != values[0] for value in values):
            raise RuntimeError(
                f"{name!r} of a {type(next(iter(own.values()))).__name__} is read directly by the module around it, "
                "but each model of an efft.SharedBackbone has its own: do not train this module, or train the models "
                "one by one"
            )
        return values[0]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parts = self.running.get()
        if parts is None:
            if not self.probing:
                raise RuntimeError(
                    "a module of an efft.SharedBackbone ran outside of its forward pass. Activation checkpointing does "
                    "this in the backward pass: switch it off, or train the models one by one"
                )
            first: Tensor = next(iter(self.own.values()))(x, *args, **kwargs)
            return first
        samples = len(parts.numbers)
        kind = type(next(iter(self.own.values()))).__name__
        place = place_of(x, samples, self.layouts, self.usual, kind)
        if place < 0 or x.shape[place] % samples:
            raise ValueError(
                f"{kind}: expected an input in which one dimension indexes the {samples} samples, got {list(x.shape)}"
            )
        n, length = x.shape[place] // samples, x.shape[place]
        cuts = [size * n for size in parts.sizes]
        leaves, structure = torch.utils._pytree.tree_flatten(((x, *args), kwargs))
        split = [
            t.split(cuts, place)
            if isinstance(t, Tensor) and t.dim() > place and t.shape[place] == length
            else [t] * len(cuts)
            for t in leaves
        ]
        outputs = []
        for name, part in zip(parts.names, zip(*split, strict=True), strict=True):
            own_args, own_kwargs = torch.utils._pytree.tree_unflatten(list(part), structure)
            outputs.append(self.own[name](*own_args, **own_kwargs))
        return _joined(outputs, place, parts, kind)


def _joined(outputs: list[Any], place: int, parts: Parts, kind: str) -> Tensor:
    """Concatenate the outputs of all parts, padded to one width."""
    if not all(isinstance(y, Tensor) for y in outputs):
        raise TypeError(f"{kind}: expected a tensor from a module with trained parameters, got {type(outputs[0])}")
    widths = [y.shape[-1] for y in outputs]
    if len(set(widths)) == 1:
        return torch.cat(outputs, place)
    joined = torch.cat([F.pad(y, (0, max(widths) - y.shape[-1])) for y in outputs], place)
    parts.padded.append((joined, widths))
    return joined
