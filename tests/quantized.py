"""Quantize linear layers with a minimal tensor subclass, and with torchao if it is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Int8(Tensor):
    """Store a frozen weight as int8 with one scale per row; support ``linear``, ``dequantize`` and copies."""

    q: Tensor
    row_scale: Tensor

    @staticmethod
    def __new__(cls, q: Tensor, row_scale: Tensor) -> Int8:
        return Tensor._make_wrapper_subclass(cls, q.shape, dtype=row_scale.dtype, device=q.device)

    def __init__(self, q: Tensor, row_scale: Tensor) -> None:
        self.q, self.row_scale = q, row_scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["q", "row_scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: None, size: Any, stride: Any) -> Int8:
        return Int8(**inner)

    def dequantize(self) -> Tensor:
        return self.q * self.row_scale

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, W, b = args
            return F.linear(x, W.dequantize().to(x.dtype), b)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten._to_copy.default):
            return cls(func(args[0].q), args[0].row_scale.clone())
        raise NotImplementedError(f"{func} of a quantized weight")

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Int8({list(self.shape)})"


def to_int8(linear: nn.Linear) -> None:
    """Quantize one layer in place with :class:`Int8`."""
    W = linear.weight.detach()
    row_scale = W.abs().amax(1, keepdim=True) / 127
    linear.weight = nn.Parameter(Int8((W / row_scale).round().to(torch.int8), row_scale), requires_grad=False)


def torchao(config: str) -> Callable[[nn.Linear], None]:
    """Return a function that quantizes one layer in place with the named configuration class of torchao."""

    def quantize(linear: nn.Linear) -> None:
        library = pytest.importorskip("torchao.quantization", reason="needs torchao")
        library.quantize_(linear, getattr(library, config)())

    return quantize


def to_nf4(linear: nn.Linear) -> None:
    """Quantize one layer in place to torchao's 4-bit normal floats, in blocks that fit tiny layers."""
    library = pytest.importorskip("torchao.quantization", reason="needs torchao")
    linear.weight = nn.Parameter(library.to_nf4(linear.weight.detach(), 16, 4), requires_grad=False)


def to_float8_rows(linear: nn.Linear) -> None:
    """Quantize one layer in place like ``Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())``.

    That configuration does not accept CPUs, although ``torch._scaled_mm`` works on them.
    """
    library = pytest.importorskip("torchao.quantization", reason="needs torchao")
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    rows = {"granularity": library.PerRow()}
    activations = QuantizeTensorToFloat8Kwargs(**rows)
    weight = library.Float8Tensor.from_hp(
        linear.weight.detach(), **rows, mm_config=Float8MMConfig(), act_quant_kwargs=activations
    )
    linear.weight = nn.Parameter(weight, requires_grad=False)


#: The formats whose products do not round the activations.
WAYS = {
    "subclass": to_int8,
    "torchao-int8": torchao("Int8WeightOnlyConfig"),
    "torchao-float8": torchao("Float8WeightOnlyConfig"),
    "torchao-nf4": to_nf4,
}
#: The formats whose products also round the activations.
ROUNDING_WAYS = {
    "torchao-int8-int8": torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao-float8-float8": to_float8_rows,
}
