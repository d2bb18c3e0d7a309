"""LayerNorm and GELU that leave their work to the adapted layer behind them, so that their outputs need not be kept.

:func:`defer` makes a module return a :class:`Deferred`: its input, and what is still to be done to it. An
:class:`efft_kernels.EfftLinear` that gets one does both at once (``tt_norm_linear``, ``tt_gelu_linear``). Whatever else
touches it makes it an ordinary tensor first, so no other module need know and none can see a wrong value; a gradient
that reaches it by another way (a custom autograd.Function) goes on to the input as it would have.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from efft_kernels.nn.weights import adapted_linear, multiplies_plainly, stored_in
from efft_kernels.ops import tt_gelu_linear, tt_norm_linear


class Deferred(Tensor):
    """What ``module(x)`` would be, not computed yet; it has that tensor's shape, dtype and device, but no memory."""

    module: nn.LayerNorm | nn.GELU
    x: Tensor
    version: int  # of x, when the module was called

    @staticmethod
    def of(module: nn.LayerNorm | nn.GELU, x: Tensor) -> Deferred:
        """The deferred ``module(x)``."""
        deferred = _Defer.apply(x, module)
        deferred.module, deferred.x, deferred.version = module, x, x._version
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
        return _computed(self.module, self._input())

    def linear(self, linear: nn.Linear, D: Tensor, G: Tensor) -> Tensor:
        """``adapted_linear(linear, value, D, G)``, without computing the value first where the base is frozen."""
        W, b = stored_in(linear, "weight"), linear.bias
        if not multiplies_plainly(linear, W) or W.requires_grad or (b is not None and b.requires_grad):
            return adapted_linear(linear, self.value(), D, G)
        if isinstance(self.module, nn.GELU):
            return tt_gelu_linear(self._input(), W, b, D, G, approximate=self.module.approximate)
        norm = self.module
        return tt_norm_linear(self._input(), norm.weight, norm.bias, W, b, D, G, eps=norm.eps)

    def _input(self) -> Tensor:
        if self.x._version != self.version:
            raise RuntimeError(
                f"the input of a {type(self.module).__name__} was changed in place before its output was used; change "
                "a copy, or undo the deferral with efft.unfuse(model)"
            )
        return self.x

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Deferred({type(self.module).__name__}, shape={list(self.shape)})"


class _Defer(torch.autograd.Function):
    """Makes the tensor, and is its node in the graph: nobody's, if an adapted layer takes the input from it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        ctx.save_for_backward(x)
        ctx.module = module
        return Tensor._make_wrapper_subclass(Deferred, x.shape, dtype=x.dtype, device=x.device)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        differentiated = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x.view_as(x) if differentiated else x.detach().requires_grad_()
            return torch.autograd.grad(_computed(ctx.module, x), x, gy, create_graph=differentiated)[0], None


def _computed(module: Any, x: Tensor) -> Tensor:
    return type(module).forward(module, x)


_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point),
}


def _drops_nothing(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    return isinstance(input, Deferred) and (p == 0 or not training)


def defer(module: nn.Module) -> bool:
    """Let ``module`` hand its work on; False (and nothing is changed) if it is no layer norm or GELU that can.

    It goes on doing its work itself where that is of use to somebody: in compiled, exported or traced code, in the
    transforms of ``torch.func``, under inference mode, with hooks on it, and if it is trained.
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
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch._C._are_functorch_transforms_active()
        or type(x) is not Tensor
        or x.is_inference()
        or any(parameter.requires_grad for parameter in module.parameters())
        or any(getattr(module, hooks) for hooks in _HOOKS)
    ):
        return _computed(module, x)
    return Deferred.of(module, x)


_HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
