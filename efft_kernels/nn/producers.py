"""Fuse the LayerNorm or GELU before an adapted layer into the layer, so that its output need not be stored.

The *producer* of a layer is the LayerNorm or GELU module whose output the layer reads. :func:`fuse_producer` makes such
a module return a :class:`ProducerOutput`, which contains the input and postpones the computation. An
:class:`efft_kernels.EfftLinear` that receives a :class:`ProducerOutput` computes the producer and the linear layer in
one op (``tt_norm_linear``, ``tt_gelu_linear``). Other operations that need the values first convert the
:class:`ProducerOutput` to an ordinary tensor, so other modules need no changes. If a custom autograd.Function uses the
:class:`ProducerOutput` and returns a gradient for it, the gradient is passed on to the input and to the norm's
parameters, just as it would be without the fusion.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from efft_kernels.ops import tt_gelu_linear, tt_norm_linear


class ProducerOutput(Tensor):
    """Represent ``module(x)`` before it is computed. It has the shape, dtype and device of the result, but no values.

    Attributes:
        module: the producer.
        x: the input of the producer.
        version: the version counter of ``x`` when the producer was called.
    """

    module: nn.LayerNorm | nn.GELU
    x: Tensor
    version: int

    @staticmethod
    def of(module: nn.LayerNorm | nn.GELU, x: Tensor) -> ProducerOutput:
        """Return ``module(x)`` without computing it."""
        output = _Postpone.apply(x, module, *module.parameters())
        output.module, output.x, output.version = module, x, x._version
        return output

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        if func is torch.nn.functional.dropout and _drops_nothing(*args, **kwargs):
            return args[0]
        args, kwargs = torch.utils._pytree.tree_map_only(ProducerOutput, ProducerOutput.value, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(
            f"{func} was called on the output of a fused LayerNorm or GELU, but not by a public function of torch. "
            "Only these compute the values of such an output; undo the fusion with efft.unfuse(model)"
        )

    def value(self) -> Tensor:
        """Compute the ordinary tensor with the module's own forward method."""
        return _compute(self.module, self._input())

    def linear(self, W: Tensor, b: Tensor | None, D: Tensor, G: Tensor) -> Tensor:
        """Compute ``a Wᵀ + b + (a D) G`` ``[..., d_out]`` for the producer's output ``a``, without saving ``a``.

        ``W`` is a plain ``[d_out, d_in]`` tensor. It gets no gradient; ``b`` and a norm's parameters may get gradients.
        """
        if isinstance(self.module, nn.GELU):
            return tt_gelu_linear(self._input(), W, b, D, G, approximate=self.module.approximate)
        x, norm = self.norm_arguments()
        return tt_norm_linear(x, W=W, b=b, D=D, G=G, **norm)

    def norm_arguments(self) -> tuple[Tensor, dict[str, Any]]:
        """Return the input of the LayerNorm, and its parameters as keyword arguments of an op."""
        norm = self.module
        assert isinstance(norm, nn.LayerNorm)
        return self._input(), {"gamma": norm.weight, "beta": norm.bias, "eps": norm.eps}

    def _input(self) -> Tensor:
        if self.x._version != self.version:
            raise RuntimeError(
                f"the input of a {type(self.module).__name__} was changed in place before its output was used; change "
                "a copy, or undo the fusion with efft.unfuse(model)"
            )
        return self.x

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ProducerOutput({type(self.module).__name__}, shape={list(self.shape)})"


class _Postpone(torch.autograd.Function):
    """Create a :class:`ProducerOutput`, and serve as its node in the autograd graph.

    An adapted layer computes the producer from its input. Then no gradient reaches this node.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.module = module
        return Tensor._make_wrapper_subclass(ProducerOutput, x.shape, dtype=x.dtype, device=x.device)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        differentiated = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x.view_as(x) if differentiated and x.requires_grad else x.detach().requires_grad_()
            leaves = [x, *(parameter for parameter in ctx.module.parameters() if parameter.requires_grad)]
            grads = iter(torch.autograd.grad(_compute(ctx.module, x), leaves, gy, create_graph=differentiated))
        dx = next(grads)
        return dx, None, *(next(grads) if parameter.requires_grad else None for parameter in ctx.module.parameters())


def _compute(module: Any, x: Tensor) -> Tensor:
    # This bypasses the forward method that fuse_producer sets on the module.
    return type(module).forward(module, x)


_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point),
}


def _drops_nothing(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    return isinstance(input, ProducerOutput) and (p == 0 or not training)


def fuse_producer(module: nn.Module) -> bool:
    """Make ``module`` postpone its computation, so that the adapted layer after the module performs it.

    The module still computes its output itself in compiled, exported and traced code, in the transforms of
    ``torch.func``, if its input is an inference tensor or of a subclass of Tensor, and while it has forward or backward
    hooks.

    Returns:
        Whether the module was fused. It must be a LayerNorm over one dimension or a GELU, or an instance of a subclass
        that computes the same. Otherwise nothing is changed. This also holds if the module is fused already, or if its
        ``forward`` was replaced on the instance.
    """
    if "forward" in module.__dict__ or not (
        isinstance(module, nn.GELU) or (isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1)
    ):
        return False
    if not _computes_like_its_base(module):
        return False
    module.__dict__["forward"] = functools.partial(_forward, module)
    return True


def _computes_like_its_base(module: Any) -> bool:  # a LayerNorm or a GELU
    """Return whether the module computes the formula of its base class.

    A subclass with its own forward method may compute something else, such as a LayerNorm that adds 1 to its weight.
    The function therefore calls that method with random numbers in place of the input and of the parameters.
    """
    base = nn.GELU if isinstance(module, nn.GELU) else nn.LayerNorm
    if type(module).forward is base.forward:
        return True
    generator = torch.Generator().manual_seed(0)
    probe = copy.copy(module)
    probe.__dict__["_parameters"] = {
        name: None if value is None else torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in module._parameters.items()
    }
    width = 8 if isinstance(module, nn.GELU) else module.normalized_shape[0]
    x = torch.randn(2, 3, width, generator=generator, dtype=torch.float64)
    try:
        with torch.no_grad():
            got = type(module).forward(probe, x)
            expected = base.forward(probe, x)
    except Exception:  # the method needs something that the probe lacks, or an input of another shape
        return False
    # Subclasses that compute in fp32 are plain as well.
    return got.shape == expected.shape and torch.allclose(got.to(torch.float64), expected, rtol=1e-4, atol=1e-4)


def unfuse_producer(module: nn.Module) -> None:
    """Undo :func:`fuse_producer`. Leave other modules unchanged."""
    if is_fused(module):
        del module.__dict__["forward"]


def is_fused(module: nn.Module) -> bool:
    """Return whether :func:`fuse_producer` has changed ``module``."""
    forward = module.__dict__.get("forward")
    return isinstance(forward, functools.partial) and forward.func is _forward


def _forward(module: Any, x: Tensor) -> Tensor:
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch._C._are_functorch_transforms_active()
        or type(x) is not Tensor
        or x.is_inference()
        or any(getattr(module, hooks) for hooks in _HOOKS)
    ):
        return _compute(module, x)
    return ProducerOutput.of(module, x)


_HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
