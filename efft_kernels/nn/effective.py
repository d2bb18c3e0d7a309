"""Give the effective weight to modules that read a weight instead of calling its layer.

The *effective weight* is ``W + (D G)ᵀ``, the frozen weight W plus its update. A module may read one of its own
parameters or a parameter of a child (``F.linear(x, self.qkv.weight)``) and never call a layer that could add the
update. In the classes of such modules and children, :func:`effective_property` replaces the parameter by a property
that returns the effective weight as an :class:`Effective`, a tensor that is computed only when it is needed.

Two uses never need the dense tensor. If the :class:`Effective` is the weight of ``F.linear``, a call of
:func:`efft_kernels.tt_linear` replaces the product. If it contains the matrices of all experts and is the second factor
of a ``torch.bmm`` or ``matmul``, low-rank products replace that product. Any other use computes the dense tensor. This
takes memory for a copy of the weight and time for a sum, and rounds the sum to the weight's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efft_kernels._calls import is_intercepted
from efft_kernels.nn.adapted import AdaptedWeight
from efft_kernels.nn.bank import Binding
from efft_kernels.nn.frozen import is_plain
from efft_kernels.ops import tt_linear


class Effective(Tensor):
    """Represent ``W + (D G)ᵀ`` before it is computed, with the shape, dtype and device of the weight ``W``.

    If a custom autograd.Function uses this tensor and returns a gradient for it, the gradient is passed on to those of
    W, D and G that require a gradient.

    Attributes:
        owner: the adapted weight.
        W: the stored weight.
        D, G: the operands of the update.
        dense: the dense tensors computed so far. The key is True for the tensor that has an autograd graph.
    """

    owner: AdaptedWeight
    W: Tensor
    D: Tensor
    G: Tensor
    dense: dict[bool, Tensor]

    @staticmethod
    def of(owner: AdaptedWeight, W: Tensor, D: Tensor, G: Tensor) -> Effective:
        """Return the effective weight of ``owner``, whose stored weight is ``W``."""
        wanted = torch.is_grad_enabled() and (D.requires_grad or G.requires_grad or W.requires_grad)
        effective = _Lazy.apply(W, D, G, owner) if wanted else _wrapper(W)
        effective.owner, effective.W, effective.D, effective.G, effective.dense = owner, W, D, G, {}
        return effective

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == REQUIRES_GRAD:  # code that moves weights creates a parameter like the stored one
            return args[0].W.requires_grad
        if func in METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        if func is Tensor.to and torch.device("meta") in map(_as_device, (*args[1:], *kwargs.values())):
            return args[0].W.to(*args[1:], **kwargs)  # a tensor on the meta device has no values to compute
        if func in _CHANGES:
            raise RuntimeError(f"{func.__name__} has no lasting effect on a weight with an update: {_LASTING}")
        if func is F.linear:
            y = _linear(*args, **kwargs)
            if y is not None:
                return y
        if func in _BATCHED and len(args) == 2 and not kwargs:
            y = _batched(*args)
            if y is not None:
                return y
        made: list[tuple[Tensor, int]] = []

        def value(effective: Effective) -> Tensor:
            tensor = effective.value()
            if not tensor.is_inference():
                made.append((tensor, tensor._version))
            return tensor

        args, kwargs = torch.utils._pytree.tree_map_only(Effective, value, (args, kwargs))
        result = func(*args, **kwargs)
        if any(tensor._version != version for tensor, version in made):
            raise RuntimeError(f"a weight with an update was changed in place, which has no lasting effect: {_LASTING}")
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # This code runs below autograd, so the values that it computes have no graph. The graph has the node of _Lazy.
        args, kwargs = torch.utils._pytree.tree_map_only(Effective, Effective._made, (args, kwargs or {}))
        return func(*args, **kwargs)

    def value(self) -> Tensor:
        """Return the dense tensor. It is computed at most once with a graph and once without."""
        graph = torch.is_grad_enabled()
        if graph not in self.dense:
            self.dense[graph] = self._made()
        return self.dense[graph]

    def _made(self) -> Tensor:
        self.owner.binding.used = self.owner.binding.read = self.owner.binding.dense = True
        return self.owner.summed(self.W, self.D, self.G)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Effective({type(self.owner).__name__}, shape={list(self.shape)})"


def _wrapper(W: Tensor) -> Any:
    return Tensor._make_wrapper_subclass(Effective, W.shape, strides=W.stride(), dtype=W.dtype, device=W.device)


class _Lazy(torch.autograd.Function):
    """Create an :class:`Effective`, and serve as its node in the autograd graph.

    The node is unused if a product with the operands or the dense tensor replaces the :class:`Effective`.
    """

    @staticmethod
    def forward(ctx: Any, W: Tensor, D: Tensor, G: Tensor, owner: AdaptedWeight) -> Tensor:
        ctx.save_for_backward(W, D, G)
        ctx.owner = owner
        return _wrapper(W)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        needed, differentiated = ctx.needs_input_grad[:3], torch.is_grad_enabled()
        with torch.enable_grad():
            leaves = [
                t.view_as(t) if differentiated else t.detach().requires_grad_(need)
                for t, need in zip(ctx.saved_tensors, needed, strict=True)
            ]
            dense = ctx.owner.summed(*leaves)
            wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
            found = iter(torch.autograd.grad(dense, wanted, gy, create_graph=differentiated))
        return *(next(found) if need else None for need in needed), None


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor | None:
    """Compute ``F.linear`` without the dense weight; return None if that is not possible."""
    if not isinstance(weight, Effective) or isinstance(input, Effective) or isinstance(bias, Effective):
        return None
    owner, W = weight.owner, weight.W
    if W.dim() != 2 or owner.matrix(W) is not W or not is_plain(W) or input.is_nested:
        return None
    owner.binding.used = owner.binding.read = True
    return tt_linear(input, W, bias, weight.D, weight.G)


def _batched(input: Any, weights: Any) -> Tensor | None:
    """Compute a batch of products without the dense weights; return None if that is not possible."""
    if not isinstance(weights, Effective) or isinstance(input, Effective) or not is_plain(weights.W):
        return None
    owner = weights.owner
    y = owner.batched(input, weights.W, weights.D, weights.G)
    if y is not None:
        owner.binding.used = owner.binding.read = True
    return y


def _as_device(argument: Any) -> Any:
    return torch.device(argument) if isinstance(argument, str) else argument


_BATCHED = {torch.bmm, torch.matmul, Tensor.bmm, Tensor.matmul, Tensor.__matmul__}
REQUIRES_GRAD = getattr(Tensor, "requires_grad").__get__  # noqa: B009
METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta")),
    *(getattr(Tensor, name).__get__ for name in ("is_nested", "is_sparse", "is_quantized", "itemsize")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.element_size, Tensor.stride),
    *(Tensor.is_contiguous, Tensor.is_complex, Tensor.get_device),
}
_CHANGES = {
    *(getattr(Tensor, name).__set__ for name in ("data", "grad", "requires_grad")),
    Tensor.requires_grad_,
}
_LASTING = "change the stored parameter (module._parameters), or disable the update first"


def effective_property(name: str, owner_of: Callable[[Any], AdaptedWeight | None]) -> property:
    """Return a property that replaces the parameter ``name`` in a class of modules.

    The property returns the stored parameter if no update is applied, else the effective weight. The effective weight
    is an :class:`Effective`, or a dense tensor in compiled, exported and traced code and under ``torch.func``.

    Args:
        name: the name of the parameter.
        owner_of: returns the adapted weight of the parameter in a module, or None to read the stored parameter.
    """

    def read(module: Any) -> Tensor:
        W = module._parameters.get(name)
        if W is None:
            W = module.__dict__.get(name)
        if W is None:
            raise AttributeError(f"{type(module).__name__!r} object has no attribute {name!r}")
        owner = owner_of(module)
        if owner is None or not owner.enabled or owner.merged:
            return W
        if _is_symbolically_traced():
            raise AttributeError(name)  # torch.fx intercepts nn.Module.__getattr__, which is called next
        try:
            return effective(owner, W)
        except AttributeError as error:  # AttributeError would make Python read the stored weight without the update
            raise RuntimeError(f"the effective {name} of a {type(module).__name__} failed: {error}") from error

    # torch's pruning and FSDP set and delete plain tensors under this name. nn.Module then calls the property.
    def write(module: nn.Module, value: Any) -> None:
        module.__dict__[name] = value

    def delete(module: nn.Module) -> None:
        if name not in module.__dict__:
            raise AttributeError(name)
        del module.__dict__[name]

    return property(read, write, delete, f"The parameter {name}, including its update if the update is applied.")


def effective(owner: AdaptedWeight, W: Tensor) -> Tensor:
    """Return the effective weight of ``owner``, whose stored weight is ``W``; differentiable."""
    if torch.compiler.is_compiling():
        return owner.summed(W, *owner.pair())
    binding = owner.binding
    used = binding.used
    D, G = owner.pair()
    binding.used = used  # reading only the dtype or the shape is not a use
    if is_intercepted():
        binding.used = binding.read = binding.dense = True
        return owner.summed(W, D, G)
    return Effective.of(owner, W, D, G)


def in_pass(binding: Binding) -> bool:
    """Return whether the binding's model is running, or a part of it is running again in the backward pass."""
    return binding.prepared is not None or in_backward()


def in_backward() -> bool:
    """Return whether autograd is running a backward pass, in which it may run a part of a model again."""
    return not torch.compiler.is_compiling() and torch._C._current_autograd_node() is not None


def _is_symbolically_traced() -> bool:
    if torch.compiler.is_compiling():
        return False
    symbolic = torch.fx._symbolic_trace.is_fx_symbolic_tracing()
    return symbolic and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None  # make_fx sets one
