"""LayerNorm and GELU that leave their work to the adapted layer behind them, so that their outputs need not be kept.

:func:`defer` makes a module return a :class:`Deferred`: its input, and what is still to be done to it. An
:class:`efft_kernels.EfftLinear` that gets one does both at once (``tt_norm_linear``, ``tt_gelu_linear``). Whatever else
touches it makes it an ordinary tensor first, so no other module need know and none can see a wrong value.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from efft_kernels.ops import tt_gelu_linear, tt_linear, tt_norm_linear


class Deferred(Tensor):
    """What ``module(x)`` would be, not computed yet; it has that tensor's shape, dtype and device, but no memory."""

    module: nn.LayerNorm | nn.GELU
    x: Tensor

    @staticmethod
    def __new__(cls, module: nn.LayerNorm | nn.GELU, x: Tensor) -> Deferred:
        deferred = Tensor._make_wrapper_subclass(
            cls, x.shape, dtype=x.dtype, device=x.device, requires_grad=x.requires_grad
        )
        deferred.module, deferred.x = module, x
        return deferred

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        if func is torch.nn.functional.dropout and _drops_nothing(*args, **kwargs):
            return args[0]
        args, kwargs = torch.utils._pytree.tree_map_only(Deferred, Deferred.value, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(
            f"{func} reached the output of a deferred LayerNorm or GELU from below torch's Python functions; undo "
            "that with efft.unfuse(model)"
        )

    def value(self) -> Tensor:
        """The ordinary tensor, computed by the module's own forward, as it would have been."""
        module: Any = self.module
        return type(module).forward(module, self.x)

    def linear(self, W: Tensor, b: Tensor | None, D: Tensor, G: Tensor) -> Tensor:
        """``tt_linear(value, W, b, D, G)``, without computing the value first where the base is frozen."""
        if W.requires_grad or (b is not None and b.requires_grad):
            return tt_linear(self.value(), W, b, D, G)
        if isinstance(self.module, nn.GELU):
            return tt_gelu_linear(self.x, W, b, D, G, approximate=self.module.approximate)
        norm = self.module
        return tt_norm_linear(self.x, norm.weight, norm.bias, W, b, D, G, eps=norm.eps)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Deferred({type(self.module).__name__}, shape={list(self.shape)})"


_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point),
}


def _drops_nothing(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    return isinstance(input, Deferred) and (p == 0 or not training)


def defer(module: nn.Module) -> bool:
    """Let ``module`` hand its work on; False (and nothing is changed) if it is no layer norm or GELU that can.

    Compiled code computes it in place: there the compiler decides what is kept. So does a norm that is trained.
    """
    if "forward" in module.__dict__ or not (
        isinstance(module, nn.GELU) or (isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1)
    ):
        return False
    module.__dict__["forward"] = functools.partial(_forward, module)
    return True


def undefer(module: nn.Module) -> None:
    """Undo :func:`defer`; does nothing to other modules."""
    forward = module.__dict__.get("forward")
    if isinstance(forward, functools.partial) and forward.func is _forward:
        del module.__dict__["forward"]


def _forward(module: Any, x: Tensor) -> Tensor:
    trained = any(parameter.requires_grad for parameter in module.parameters())
    if torch.compiler.is_compiling() or trained or type(x) is not Tensor:
        return type(module).forward(module, x)
    return Deferred(module, x)
