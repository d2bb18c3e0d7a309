"""Frozen layers and weights: :class:`FrozenLayer`, the base of the adapted layers, and quantized weights.

A weight may not be a plain dense tensor: those of torchao and bitsandbytes are quantized.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

from torch import Tensor, nn


class FrozenLayer(nn.Module):
    """A layer that stands in for another one, with the very same ``weight``, ``bias`` and hooks.

    Names in the state dict therefore stay as they are, and handles stay valid. The class of a linear layer with a
    quantized weight may have its own product and state dict, as those of bitsandbytes do. The class of its stand-in is
    then made from both classes, so that it keeps them.

    Raises:
        TypeError: :func:`cannot_wrap` has a reason.
    """

    adapts: ClassVar[type[nn.Module]] = nn.Linear
    """The class of the layers that this class can stand in for."""
    product: ClassVar[Callable[..., Tensor]] = nn.Linear.forward
    """The product of the linear layer that is stood in for (:func:`efft_kernels.nn.linear.frozen_linear` uses it)."""

    weight: Tensor

    def __new__(cls, layer: Any = None, *args: Any, **kwargs: Any) -> FrozenLayer:
        return super().__new__(_of_both(cls, type(layer)) if _has_class_of_its_own(layer) else cls)

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        """Return None if this class can stand in for ``layer``, else the reason."""
        return cannot_wrap(layer, cls.adapts)

    def __init__(self, layer: nn.Module) -> None:
        reason = self.refusal(layer)
        if reason is not None:
            raise TypeError(f"{type(self).__name__}: {reason}")
        nn.Module.__init__(self)  # the layer's own would allocate and draw a weight
        share_attributes(layer, self)
        for name in ("weight", "bias"):
            if name == "weight" or name in layer._parameters:
                self.register_parameter(name, layer._parameters[name])


def _has_class_of_its_own(layer: Any) -> bool:
    """Whether only the class of ``layer`` says what it computes, so that its stand-in must be of that class too."""
    if isinstance(layer, FrozenLayer):
        return False
    quantized = isinstance(layer, nn.Linear) and not is_plain(layer.weight) and type(layer) is not nn.Linear
    return quantized or is_conv1d(layer)


_of_both_kinds: dict[tuple[type, type], type[FrozenLayer]] = {}


def _of_both(stand_in: type[FrozenLayer], kind: type[nn.Module]) -> type[FrozenLayer]:
    """Return the class of stand-ins of class ``stand_in`` for layers of class ``kind``."""

    def reduce(self: FrozenLayer, protocol: object) -> tuple[Any, ...]:  # pickle finds classes by name only
        return _empty, (stand_in, kind), self.__dict__

    if (stand_in, kind) not in _of_both_kinds:
        parts: dict[str, Any] = {"product": kind.forward, "__reduce_ex__": reduce, "__doc__": stand_in.__doc__}
        if issubclass(kind, nn.Linear):  # its own product reads the weight, and means the stored one
            parts["weight"] = property(lambda layer: _stored_weight(layer))
        own_name = stand_in.__name__.endswith(kind.__name__)
        name = stand_in.__name__ if own_name else f"{stand_in.__name__}{kind.__name__}"
        _of_both_kinds[stand_in, kind] = type(name, (stand_in, kind), parts)
    return _of_both_kinds[stand_in, kind]


def _stored_weight(layer: nn.Module) -> Tensor:
    if layer._parameters.get("weight") is None:
        raise AttributeError("weight")
    return stored_in(layer, "weight")


def _empty(stand_in: type[FrozenLayer], kind: type[nn.Module]) -> FrozenLayer:
    both = _of_both(stand_in, kind)
    return both.__new__(both)


def share_attributes(source: nn.Module, target: nn.Module) -> None:
    """Give ``target`` the mode, the hooks and all other attributes of ``source``, but no parameters.

    Attributes that only adapted layers have stay where they are, and so does a compiled forward.
    """
    target.__dict__.update({name: value for name, value in source.__dict__.items() if name not in _NOT_SHARED})


_NOT_SHARED = {
    *("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules", "forward", "_compiled_call_impl"),
    "extra_repr",  # torchao sets one that is bound to the layer
    *(
        "factors",
        "site",
        "binding",
        "enabled",
        "read",
        "reader",
        "sharing",
        "view",
        "selected",
        "stacks",
        "layouts",
        "learned",
    ),
}


def is_conv1d(layer: object) -> bool:
    """Whether ``layer`` is a ``Conv1D`` of transformers (GPT-2), a linear layer whose weight is ``[d_in, d_out]``."""
    if not (isinstance(layer, nn.Module) and any(kind.__name__ == "Conv1D" for kind in type(layer).__mro__)):
        return False
    weight = layer._parameters.get("weight")
    return hasattr(layer, "nf") and weight is not None and weight.dim() == 2 and weight.shape[1] == layer.nf


def read_by_its_parent(layer: nn.Module) -> str | None:
    """Return why only a sum with the weight of ``layer`` has an effect: its parent never calls it. None if it does."""
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return (
            "this is the out_proj of nn.MultiheadAttention, which reads the weight and never calls the layer, so what "
            "the layer adds to the product would be ignored; use an attention module with separate linear layers"
        )
    return None


def cannot_wrap(layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> str | None:
    """Return None if a :class:`FrozenLayer` can stand in for ``layer`` as one of class ``kind``, else the reason."""
    if isinstance(layer, FrozenLayer):
        return f"this layer is adapted already: it is of type {type(layer).__name__}"
    if not isinstance(layer, kind):
        return f"expected an nn.{kind.__name__}, got {type(layer).__name__}"
    return not_only_a_weight(layer, kind)


def not_only_a_weight(layer: nn.Module, kind: type[nn.Module]) -> str | None:
    """Return None if ``layer`` computes what layers of class ``kind`` do, from weight and bias alone, else why not."""
    own = any(
        getattr(type(layer), name) is not getattr(kind, name)
        for name in ("forward", "_conv_forward")
        if hasattr(kind, name)
    )
    if own and (kind is not nn.Linear or is_plain(cast(Tensor, layer.weight))):
        return f"{type(layer).__name__} has a forward of its own, which the adapted layer would drop"
    if "forward" in layer.__dict__:
        return "a forward was set on the layer itself, which the adapted layer would drop; undo that first"
    if getattr(layer, "parametrizations", None):
        return "the layer's weight is parametrized; remove the parametrization first"
    more = {*layer._parameters, *layer._buffers, *layer._modules} - {"weight", "bias"}
    if more or not isinstance(layer.weight, nn.Parameter):
        return (
            f"expected the parameters weight and bias alone, found {', '.join(sorted(more)) or 'a computed weight'} "
            "too, as torch.nn.utils.weight_norm and its like add them; remove that first"
        )
    return None


def is_plain(weight: Tensor) -> bool:
    """Whether the memory of ``weight`` holds its entries in its dtype, so that a kernel can read them."""
    # torch's own is_traceable_wrapper_subclass looks for the first attribute; bitsandbytes' parameters have the second.
    return not hasattr(type(weight), "__tensor_flatten__") and not hasattr(type(weight), "_quantize")


def can_dequantize(weight: Tensor) -> bool:
    """Whether ``weight`` is plain, or its class says how to make it dense."""
    return is_plain(weight) or type(weight).dequantize is not Tensor.dequantize


def dequantized(weight: Tensor) -> Tensor:
    """Return the dense values of ``weight`` ``[d_out, d_in]`` in its dtype; a plain weight is returned itself.

    Raises:
        TypeError: the class of the weight does not say how to make it dense (bitsandbytes' classes do not).
    """
    if is_plain(weight):
        return weight
    if not can_dequantize(weight):
        raise TypeError(
            f"expected a weight whose class has dequantize(), as torchao's, got a {type(weight).__name__}: load the "
            "adapter onto the dense base for dense weights"
        )
    dense: Tensor = getattr(
        weight, "get_original_weight", weight.dequantize
    )()  # NF4Tensor's dequantize is something else
    return dense.to(weight.dtype)


def stored_in(module: nn.Module, name: str) -> Tensor:
    """Return what ``module`` owns under the name of an adapted parameter, past the property that hides it.

    Raises:
        AttributeError: it owns nothing of this name.
    """
    W = module._parameters.get(name)
    if W is None:  # torch's pruning and FSDP's flattening set a plain tensor in the place of the parameter
        W = module.__dict__.get(name)
    if W is None:  # parametrized: the property is torch's
        W = getattr(module, name)
    return cast(Tensor, W)
