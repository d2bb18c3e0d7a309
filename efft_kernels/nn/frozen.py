"""``FrozenLayer``: what layers with an adapter have in common: they stand in for a frozen layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from efft_kernels.nn.weights import is_plain


class FrozenLayer(nn.Module):
    """A layer in the place of another, with the same ``weight``, ``bias`` and hooks (the very objects), so state-dict
    names stay as they are and handles stay valid.

    A linear layer whose weight is quantised may have a product and a state dict of its class's own, as those of
    bitsandbytes do. Its stand-in then is of a class made from both, so that it goes on having them.

    Raises:
        TypeError: :func:`cannot_wrap` has a reason.
    """

    adapts: ClassVar[type[nn.Linear | nn.Conv2d]] = nn.Linear
    """What a layer must have been."""
    product: ClassVar[Callable[..., Tensor]] = nn.Linear.forward
    """What the class of a linear layer computes (:func:`efft_kernels.nn.weights.frozen_linear` asks for it)."""

    weight: Tensor

    def __new__(cls, layer: Any = None, *args: Any, **kwargs: Any) -> FrozenLayer:
        own = isinstance(layer, nn.Linear) and not isinstance(layer, FrozenLayer) and not is_plain(layer.weight)
        return super().__new__(_of_both(cls, type(layer)) if own and type(layer) is not nn.Linear else cls)

    def __init__(self, layer: nn.Module) -> None:
        reason = cannot_wrap(layer, self.adapts)
        if reason is not None:
            raise TypeError(f"{type(self).__name__}: {reason}")
        nn.Module.__init__(self)  # the layer's own would allocate and draw a weight
        share_attributes(layer, self)
        self.weight = cast(nn.Parameter, layer.weight)
        self.register_parameter("bias", cast("nn.Parameter | None", layer.bias))


_of_both_kinds: dict[tuple[type, type], type[FrozenLayer]] = {}


def _of_both(stand_in: type[FrozenLayer], linear: type[nn.Linear]) -> type[FrozenLayer]:
    """The class of stand-ins of this class for layers of that one."""

    def reduce(self: FrozenLayer, protocol: object) -> tuple[Any, ...]:  # pickle finds classes by their names alone
        return _empty, (stand_in, linear), self.__dict__

    if (stand_in, linear) not in _of_both_kinds:
        parts = {"product": linear.forward, "__reduce_ex__": reduce, "__doc__": stand_in.__doc__}
        name = f"{stand_in.__name__}{linear.__name__}"
        _of_both_kinds[stand_in, linear] = type(name, (stand_in, linear), parts)
    return _of_both_kinds[stand_in, linear]


def _empty(stand_in: type[FrozenLayer], linear: type[nn.Linear]) -> FrozenLayer:
    kind = _of_both(stand_in, linear)
    return kind.__new__(kind)


def share_attributes(source: nn.Module, target: nn.Module) -> None:
    """Let ``target`` stand in for ``source``: its mode, its hooks and whatever was set on it, but no parameters.

    What only the adapted layer has, and a compiled form of the other's forward, stays where it is.
    """
    target.__dict__.update({name: value for name, value in source.__dict__.items() if name not in _NOT_SHARED})


_NOT_SHARED = {
    *("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules", "forward", "_compiled_call_impl"),
    "extra_repr",  # torchao sets one that is bound to the layer
    *("factors", "site", "binding", "enabled", "selected", "stacks", "layouts", "learned"),
}


def cannot_wrap(linear: nn.Module, kind: type[nn.Linear | nn.Conv2d] = nn.Linear) -> str | None:
    """None if a :class:`FrozenLayer` can stand in for a layer of this kind, else the reason."""
    if isinstance(linear, FrozenLayer):
        return f"this layer is adapted already: it is of type {type(linear).__name__}"
    if not isinstance(linear, kind):
        return f"expected an nn.{kind.__name__}, got {type(linear).__name__}"
    if isinstance(linear, nn.Conv2d) and linear.groups != 1:
        return f"a convolution of {linear.groups} groups is no product with one matrix; expected groups=1"
    if isinstance(linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return (
            "this is the out_proj of nn.MultiheadAttention, which reads the weight and never calls the layer, so a "
            "delta on it would be ignored; use an attention module with separate linear layers"
        )
    if type(linear).forward is not kind.forward and (kind is not nn.Linear or is_plain(linear.weight)):
        return f"{type(linear).__name__} has a forward of its own, which the adapted layer would drop"
    if "forward" in linear.__dict__:
        return "a forward was set on the layer itself, which the adapted layer would drop; undo that first"
    if getattr(linear, "parametrizations", None):
        return "the layer's weight is parametrized; remove the parametrization first"
    more = {*linear._parameters, *linear._buffers, *linear._modules} - {"weight", "bias"}
    if more or not isinstance(linear.weight, nn.Parameter):
        return (
            f"expected the parameters weight and bias alone, found {', '.join(sorted(more)) or 'a computed weight'} "
            "too, as torch.nn.utils.weight_norm and its like add them; remove that first"
        )
    return None
