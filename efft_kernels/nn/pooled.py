"""Define linear layers that hold the updates, or entire weights, of many adapters. A call uses the selected adapters.

The adapters are stored as *stacks*: tensors with one row (entry of the first dimension) per adapter. Row 0 stands for
the frozen base model without an adapter.

A module around such a layer may read the weight of the layer instead of calling it (``F.linear(x, self.qkv.weight,
bias)``). While adapters are selected, the weight is therefore a :class:`SelectedParameter`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efft_kernels._calls import is_intercepted
from efft_kernels.nn.effective import METADATA, REQUIRES_GRAD
from efft_kernels.nn.frozen import FrozenLayer, dequantized, read_by_its_parent, stored_in
from efft_kernels.nn.linear import adapted_linear, frozen_linear, multiplies_plainly
from efft_kernels.ops import tt_linear, tt_linear_grouped


class Selection(NamedTuple):
    """Select rows of the stacks: one row per sample of a batch or, with ``weights``, a weighted sum for all samples."""

    slots: Tensor  # int64 [samples], or [k] with weights: the selected rows
    weights: Tensor | None  # fp32 (fp64 for an fp64 model) [k]


#: The dimension of an input [..., in_features] that indexes the samples of a batch. It is 0 even if each sample has
#: several consecutive entries in the first dimension. It is -1 if consecutive rows belong to different samples, and
#: None if no dimension indexes the samples.
Layout = int | None


def place_of(x: Tensor, samples: int, layouts: Mapping[int, Layout], usual: Collection[int], name: str) -> int:
    """Return the dimension of ``x`` that indexes the samples, or -1 (see :data:`Layout`).

    Args:
        x: the input of a module.
        samples: the number of samples.
        layouts, usual: as in :class:`PooledLinear`.
        name: the class of the module, for the error.

    Raises:
        ValueError: ``x`` has no such dimension, or it is not known.
    """
    rows = math.prod(x.shape[:-1])
    if rows == samples or samples == 1:
        return 0
    # This order of checks does not read ``usual`` if only the first dimension can index the samples. Code that was
    # compiled for such inputs therefore stays valid when the layouts become known.
    is_usual = x.shape[0] == samples and (samples not in x.shape[1:-1] or x.dim() in usual)
    place = layouts.get(x.dim(), 0 if is_usual else None)
    if place is None or rows % samples or (place > 0 and x.shape[place] != samples):
        raise ValueError(
            f"{name}: expected the rows of {samples} samples, one after the other, got an input of "
            f"shape {list(x.shape)}; a layer that mixes samples, or is not known to keep them in order, cannot use "
            "one adapter per sample (the first uncompiled call of the whole model detects the order; if its samples do "
            "not show the order, use another number of samples)"
        )
    return place


class SelectedParameter(Tensor):
    """Represent the weight or the bias of a :class:`PooledLinear` with the selected adapters, before it is computed.

    As the weight of ``F.linear``, it is multiplied as in a call of the layer. Any other use computes it, which is
    possible only if all samples use the same adapters.

    Attributes:
        layer: the layer.
        part: ``"weight"`` or ``"bias"``.
    """

    layer: PooledLinear
    part: str

    @staticmethod
    def of(layer: PooledLinear, name: str, stored: Tensor) -> SelectedParameter:
        """Return the parameter ``name`` of ``layer``, which stores the tensor ``stored`` for the base."""
        parameter: SelectedParameter = Tensor._make_wrapper_subclass(
            SelectedParameter, stored.shape, strides=stored.stride(), dtype=stored.dtype, device=stored.device
        )
        parameter.layer, parameter.part = layer, name
        return parameter

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METADATA or func == REQUIRES_GRAD:
            return super().__torch_function__(func, types, args, kwargs or {})
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        return func(*torch.utils._pytree.tree_map_only(cls, cls.value, args), **_computed(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*torch.utils._pytree.tree_map_only(cls, cls.value, args), **_computed(kwargs or {}))

    def value(self) -> Tensor:
        """Return the parameter as a dense tensor.

        Raises:
            ValueError: the samples use different adapters.
        """
        return self.layer.dense(self.part)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"SelectedParameter({type(self.layer).__name__}.{self.part}, shape={list(self.shape)})"


def _computed(tensors: Any) -> Any:
    return torch.utils._pytree.tree_map_only(SelectedParameter, SelectedParameter.value, tensors)


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor:
    """Compute ``F.linear`` with the selected adapters."""
    is_weight = isinstance(weight, SelectedParameter) and weight.part == "weight"
    if not is_weight or isinstance(input, SelectedParameter):
        return F.linear(_computed(input), _computed(weight), _computed(bias))
    layer = weight.layer
    own = bias.layer is layer if isinstance(bias, SelectedParameter) else bias is layer._parameters.get("bias")
    if bias is not None and own:
        return layer.multiply(input)
    return layer.multiply(input, None if bias is None else _computed(bias), own_bias=False)


class PooledLinear(FrozenLayer, nn.Linear):
    """Compute a frozen linear layer with the selected adapters. Two stacks contain one row per adapter.

    This is an ``nn.Linear`` with the same ``weight``, ``bias`` and hooks as the layer that it replaces. Several layers
    may share the stacks, which are not part of the layer's state dict.

    Args:
        linear: the layer to replace.
        selected: the context variable that contains the current :class:`Selection`, or None to use only the base model.
            Each thread and each asyncio task has its own value.

    Raises:
        TypeError: ``linear`` is not a plain ``nn.Linear``.
    """

    stacks: tuple[Tensor, Tensor | None]
    layouts: dict[int, Layout]
    """Maps the number of dimensions of an input to its :data:`Layout`, if it is known and not in ``usual``."""
    usual: frozenset[int]
    """The numbers of dimensions of the inputs whose first dimension is known to have one entry per sample.

    If nothing is known about an input, this is assumed, unless another dimension is as long as the first."""

    read: bool
    """Whether a module around the layer is known to read the weight directly."""
    has_own_bias: bool
    """Whether each adapter has its own bias."""

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        return super().refusal(layer) or read_by_its_parent(layer)

    def __init__(self, linear: nn.Linear, selected: ContextVar[Selection | None]) -> None:
        super().__init__(linear)
        self.selected, self.layouts, self.usual, self.read, self.has_own_bias = selected, {}, frozenset(), False, False

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight of the base or, while adapters are selected, their weight."""
        return self._parameter("weight", own=True)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The bias of the base or, while adapters are selected that have their own biases, their bias."""
        stored = self._stored_bias()
        return None if stored is None else self._parameter("bias", own=self.has_own_bias)

    def _stored_bias(self) -> Tensor | None:
        if "bias" not in self._parameters:
            raise AttributeError("bias")
        return self._parameters["bias"]

    def _parameter(self, name: str, own: bool) -> Tensor:
        stored = self._parameters.get(name)
        if stored is None:
            raise AttributeError(name)
        try:
            if not own or self.uses_base():
                return stored
            if not is_intercepted():
                return SelectedParameter.of(self, name, stored)
            # Code that reads only the dtype or the shape of a weight must not fail.
            return self.dense(name) if self.read or self.selection().weights is not None else stored
        except AttributeError as error:  # AttributeError would make Python read the stored parameter
            raise RuntimeError(f"the selected {name} of a {type(self).__name__} failed: {error}") from error

    def uses_base(self) -> bool:
        """Return whether no adapter is selected."""
        return self.selected.get() is None

    def selection(self) -> Selection:
        """Return the current selection, if :meth:`uses_base` is False."""
        selection = self.selected.get()
        assert selection is not None
        return selection

    def dense(self, name: str) -> Tensor:
        """Return the weight or the bias that all samples use.

        Raises:
            ValueError: the samples use different adapters.
        """
        slots, weights = self.selection()
        if weights is None:
            raise ValueError(
                f"the {name} of a {type(self).__name__} is read directly by the module around it, and the samples use "
                "different adapters: use one adapter for all samples, or exclude this layer when you adapt the model"
            )
        return self.mixed_parameter(name, slots, weights)

    def forward(self, x: Tensor) -> Tensor:  # [..., in_features] -> [..., out_features]
        return frozen_linear(self, x) if self.uses_base() else self.multiply(x)

    def multiply(self, x: Tensor, b: Tensor | None = None, *, own_bias: bool = True) -> Tensor:
        """Return the output for ``x`` ``[..., in_features]`` with the selected adapters.

        With ``own_bias=False``, the bias is ``b`` ``[out_features]`` or None, instead of that of the adapters.
        """
        slots, weights = self.selection()
        if weights is not None:
            return self.summed(x, slots, weights) if own_bias else self.summed(x, slots, weights, b, own_bias=False)
        samples = len(slots)
        place = place_of(x, samples, self.layouts, self.usual, type(self).__name__)
        if place == -1:
            x_of = x.reshape(-1, samples, self.in_features).transpose(0, 1)
            # [rows / samples, samples, out_features]
            y = self.one_each(x_of, slots, b, own_bias=own_bias).transpose(0, 1)
            return y.reshape(*x.shape[:-1], self.out_features)
        first = x.movedim(place, 0)
        y = self.one_each(first.reshape(samples, -1, self.in_features), slots, b, own_bias=own_bias)
        return y.reshape(*first.shape[:-1], self.out_features).movedim(0, place)

    @abstractmethod
    def mixed(self, slots: Tensor, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return one tensor per stack that represents the weighted sum of the adapters in ``slots`` [k]."""

    @abstractmethod
    def mixed_parameter(self, name: str, slots: Tensor, weights: Tensor) -> Tensor:
        """Return the dense weight or bias of the weighted sum of the adapters in ``slots`` [k]."""

    @abstractmethod
    def summed(
        self, x: Tensor, slots: Tensor, weights: Tensor, b: Tensor | None = None, *, own_bias: bool = True
    ) -> Tensor:
        """Return the output for ``x`` [..., in_features] with the weighted sum of the adapters in ``slots`` [k].

        ``b`` and ``own_bias`` are those of :meth:`multiply`.
        """

    @abstractmethod
    def one_each(self, x: Tensor, slots: Tensor, b: Tensor | None = None, *, own_bias: bool = True) -> Tensor:
        """Return the output for ``x`` [samples, rows, in_features], where sample i uses the adapter ``slots[i]``.

        ``b`` and ``own_bias`` are those of :meth:`multiply`.
        """


class PooledDelta(PooledLinear):
    """Compute ``y = x Wᵀ + b + (x D) G`` with stacks D ``[n, in_features, r]`` and G ``[n, r', out_features]``.

    Row 0 of the stacks is zero, and so are the entries beyond the rank of each adapter. An adapter's rank is at most
    the smaller of r and r'.
    """

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the stacks D and G, cut to the same rank."""
        D, G = self.stacks
        assert G is not None
        rank = min(D.shape[2], G.shape[1])  # layers with a higher rank may share D
        return D[:, :, :rank], G[:, :rank]

    def mixed(self, slots: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``D = [D_1 | D_2 | ...]`` and ``G = [w_1 G_1; w_2 G_2; ...]``.

        Their product is exactly the weighted sum of the updates. Its rank is the sum of all ranks.
        """
        D, G = self.factors()
        D = D[slots].transpose(0, 1).flatten(1)  # [in_features, k r]
        return D, (weights[:, None, None] * G[slots]).flatten(0, 1).to(D.dtype)  # [k r, out_features]

    def mixed_parameter(self, name: str, slots: Tensor, weights: Tensor) -> Tensor:
        assert name == "weight", "the adapters have no biases of their own"
        W = dequantized(stored_in(self, "weight"))
        D, G = self.mixed(slots, weights)
        wide = torch.promote_types(W.dtype, torch.float32)
        return (W.to(wide) + (D.to(wide) @ G.to(wide)).t()).to(W.dtype)

    def summed(
        self, x: Tensor, slots: Tensor, weights: Tensor, b: Tensor | None = None, *, own_bias: bool = True
    ) -> Tensor:
        D, G = self.mixed(slots, weights)
        if own_bias:
            return adapted_linear(self, x, D, G)
        W = stored_in(self, "weight")
        if multiplies_plainly(self, W):
            return tt_linear(x, W, b, D, G)
        return F.linear(x, self.mixed_parameter("weight", slots, weights), b)

    def one_each(self, x: Tensor, slots: Tensor, b: Tensor | None = None, *, own_bias: bool = True) -> Tensor:
        D, G = self.factors()
        W = stored_in(self, "weight")
        if multiplies_plainly(self, W):
            return tt_linear_grouped(x, W, self.bias if own_bias else b, D, G, slots)
        h = torch.bmm(x, D[slots].to(x.dtype))  # [samples, rows, r]
        y = frozen_linear(self, x) if own_bias else F.linear(x, dequantized(W), b)
        return y + torch.bmm(h, G[slots].to(x.dtype))


class PooledWeights(PooledLinear):
    """Compute ``y = x Wᵀ + b``, where each adapter replaces the entire weight and bias, as in a classifier.

    The stacks are W ``[n, out_features, in_features]`` and b ``[n, out_features]`` or None. Row 0 contains the base.
    """

    def __init__(self, linear: nn.Linear, selected: ContextVar[Selection | None]) -> None:
        super().__init__(linear, selected)
        self.has_own_bias = self._parameters.get("bias") is not None

    def mixed(self, slots: Tensor, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        W, b = self.stacks
        summed = (weights[:, None, None] * W[slots]).sum(0).to(W.dtype)
        return summed, None if b is None else (weights[:, None] * b[slots]).sum(0).to(b.dtype)

    def mixed_parameter(self, name: str, slots: Tensor, weights: Tensor) -> Tensor:
        W, b = self.mixed(slots, weights)
        result = W if name == "weight" else b
        assert result is not None
        return result

    def summed(
        self, x: Tensor, slots: Tensor, weights: Tensor, b: Tensor | None = None, *, own_bias: bool = True
    ) -> Tensor:
        W, own = self.mixed(slots, weights)
        return F.linear(x, W, own if own_bias else b)

    def one_each(self, x: Tensor, slots: Tensor, b: Tensor | None = None, *, own_bias: bool = True) -> Tensor:
        W, own = self.stacks
        W = W[slots].transpose(1, 2)  # [samples, in_features, out_features]
        if own_bias:
            b = None if own is None else own[slots][:, None]
        return torch.bmm(x, W) if b is None else torch.baddbmm(b, x, W)
