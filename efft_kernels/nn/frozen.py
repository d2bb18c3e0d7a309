"""Define :class:`FrozenLayer`, the base class of layers that replace a frozen layer, and helper functions.

The helper functions decide whether a layer can be replaced, and convert quantized weights. A *stand-in* is a layer that
replaces a layer of a model. A *plain* weight is a dense tensor whose memory contains its entries; the weights of
torchao and bitsandbytes are quantized instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

from torch import Tensor, nn


class FrozenLayer(nn.Module):
    """Replace another layer, using the same ``weight``, ``bias`` and hooks.

    Names in the state dict therefore stay the same, and hook handles stay valid. The class of a linear layer with a
    quantized weight may define its own product and state dict (the classes of bitsandbytes do). The class of the
    stand-in then inherits from both classes, which preserves that product and state dict.

    Raises:
        TypeError: the layer cannot be replaced (:func:`cannot_wrap` returns the reason).
    """

    adapts: ClassVar[type[nn.Module]] = nn.Linear
    """The class of the layers that this class can replace."""
    product: ClassVar[Callable[..., Tensor]] = nn.Linear.forward
    """The product of the linear layer that was replaced (:func:`efft_kernels.nn.linear.frozen_linear` calls it)."""

    weight: Tensor

    def __new__(cls, layer: Any = None, *args: Any, **kwargs: Any) -> FrozenLayer:
        return super().__new__(_of_both(cls, type(layer)) if _has_class_of_its_own(layer) else cls)

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        """Return None if this class can replace ``layer``, else the reason."""
        return cannot_wrap(layer, cls.adapts)

    def __init__(self, layer: nn.Module) -> None:
        reason = self.refusal(layer)
        if reason is not None:
            raise TypeError(f"{type(self).__name__}: {reason}")
        nn.Module.__init__(self)  # the constructor of the layer's class would allocate and initialize a weight
        share_attributes(layer, self)
        for name in ("weight", "bias"):
            if name == "weight" or name in layer._parameters:
                self.register_parameter(name, layer._parameters[name])


def _has_class_of_its_own(layer: Any) -> bool:
    """Return whether the stand-in must inherit from the class of ``layer``, because that class computes the product.

    This is the case for a ``Conv1D`` of transformers and for linear layers of other classes with a quantized weight.
    """
    if isinstance(layer, FrozenLayer):
        return False
    quantized = isinstance(layer, nn.Linear) and not is_plain(layer.weight) and type(layer) is not nn.Linear
    return quantized or is_conv1d(layer)


_of_both_kinds: dict[tuple[type, type], type[FrozenLayer]] = {}


def _of_both(stand_in: type[FrozenLayer], kind: type[nn.Module]) -> type[FrozenLayer]:
    """Return the class for stand-ins of class ``stand_in`` that replace layers of class ``kind``."""

    def reduce(self: FrozenLayer, protocol: object) -> tuple[Any, ...]:  # pickle finds only classes with a module path
        return _empty, (stand_in, kind), self.__dict__

    if (stand_in, kind) not in _of_both_kinds:
        parts: dict[str, Any] = {"product": kind.forward, "__reduce_ex__": reduce, "__doc__": stand_in.__doc__}
        if issubclass(kind, nn.Linear):  # the product of that class must read the stored weight, without the update
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
    """Copy the mode, the hooks and all other attributes of ``source`` to ``target``.

    Parameters, buffers, submodules, a forward method that was set or compiled, and attributes that exist only in
    adapted layers are not copied.
    """
    target.__dict__.update({name: value for name, value in source.__dict__.items() if name not in _NOT_SHARED})


_NOT_SHARED = {
    *("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules", "forward", "_compiled_call_impl"),
    "extra_repr",  # torchao sets an extra_repr that is bound to the layer
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
        "usual",
        "has_own_bias",
    ),
}


def is_conv1d(layer: object) -> bool:
    """Return whether ``layer`` is a ``Conv1D`` of transformers (GPT-2): a layer with weight ``[d_in, d_out]``."""
    if not (isinstance(layer, nn.Module) and any(kind.__name__ == "Conv1D" for kind in type(layer).__mro__)):
        return False
    weight = layer._parameters.get("weight")
    return hasattr(layer, "nf") and weight is not None and weight.dim() == 2 and weight.shape[1] == layer.nf


def read_by_its_parent(layer: nn.Module) -> str | None:
    """Return a reason not to replace ``layer`` if its parent reads the weight and never calls the layer, else None."""
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return (
            "this is the out_proj of nn.MultiheadAttention, which reads the weight and never calls the layer, so an "
            "update added by the layer would be ignored; use an attention module with separate linear layers"
        )
    return None


def cannot_wrap(layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> str | None:
    """Return None if a :class:`FrozenLayer` can replace ``layer`` as a layer of class ``kind``, else the reason."""
    if isinstance(layer, FrozenLayer):
        return f"this layer is adapted already: it is of type {type(layer).__name__}"
    if not isinstance(layer, kind):
        return f"expected an nn.{kind.__name__}, got {type(layer).__name__}"
    return not_only_a_weight(layer, kind)


def not_only_a_weight(layer: nn.Module, kind: type[nn.Module]) -> str | None:
    """Return None if ``layer`` computes the function of class ``kind`` from only weight and bias, else the reason."""
    own = any(
        getattr(type(layer), name) is not getattr(kind, name)
        for name in ("forward", "_conv_forward")
        if hasattr(kind, name)
    )
    if own and (kind is not nn.Linear or is_plain(cast(Tensor, layer.weight))):
        return f"{type(layer).__name__} has its own forward method, which the adapted layer would not call"
    if "forward" in layer.__dict__:
        return "a forward method was set on the layer itself, which the adapted layer would not call; undo that first"
    if getattr(layer, "parametrizations", None):
        return "the layer's weight is parametrized; remove the parametrization first"
    more = {*layer._parameters, *layer._buffers, *layer._modules} - {"weight", "bias"}
    if more or not isinstance(layer.weight, nn.Parameter):
        return (
            f"expected only the parameters weight and bias, found {', '.join(sorted(more)) or 'a computed weight'} "
            "too, which torch.nn.utils.weight_norm or a similar function added; undo that first"
        )
    return None


def is_plain(weight: Tensor) -> bool:
    """Return whether the memory of ``weight`` contains its entries in its dtype, so that a kernel can read them."""
    if type(weight) is nn.Parameter:
        return True
    # torch's is_traceable_wrapper_subclass checks the first attribute. bitsandbytes' parameters have only the second.
    return not hasattr(type(weight), "__tensor_flatten__") and not hasattr(type(weight), "_quantize")


def can_dequantize(weight: Tensor) -> bool:
    """Return whether ``weight`` is plain, or its class can convert it to a dense tensor."""
    return is_plain(weight) or type(weight).dequantize is not Tensor.dequantize


def dequantized(weight: Tensor) -> Tensor:
    """Return the dense values of ``weight`` ``[d_out, d_in]`` in its dtype; return a plain weight itself.

    Raises:
        TypeError: the class of the weight has no ``dequantize()`` of its own (the classes of bitsandbytes have none).
    """
    if is_plain(weight):
        return weight
    if not can_dequantize(weight):
        raise TypeError(
            f"expected a weight whose class has dequantize(), as torchao's do, got a {type(weight).__name__}: load the "
            "adapter onto the dense base model to get dense weights"
        )
    dense: Tensor = getattr(
        weight, "get_original_weight", weight.dequantize
    )()  # the dequantize of NF4Tensor has another purpose
    return dense.to(weight.dtype)


def stored_in(module: nn.Module, name: str) -> Tensor:
    """Return the tensor that ``module`` stores as the adapted parameter ``name``, without the update.

    Raises:
        AttributeError: the module owns no tensor with this name.
    """
    W: Tensor | None = module._parameters.get(name)
    if W is not None:
        return W
    W = module.__dict__.get(name)  # torch's pruning and FSDP's flattening replace the parameter by a plain tensor
    if W is None:  # the weight is parametrized, and torch computes it in a property of this name
        return cast(Tensor, getattr(module, name))
    return W
