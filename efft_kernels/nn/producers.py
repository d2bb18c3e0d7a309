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
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efft_kernels._calls import is_transformed
from efft_kernels.ops import tt_gelu_linear, tt_linear, tt_norm_linear


class ProducerOutput(Tensor):
    """Represent ``module(x)`` before it is computed. It has the shape, dtype and device of the result, but no values.

    Attributes:
        module: the producer.
        x: the input of the producer.
        approximate: which GELU the producer computes, "none" or "tanh"; None if it is a LayerNorm.
        parameters: the parameters of the producer when it was called.
        versions: the version counters of ``x`` and of ``parameters`` when the producer was called.
        with_graph: whether autograd recorded the call of the producer.
        computed: computed values that another operation refers to, each with its :func:`_state` before this operation.
            The state is None if changes of the values cannot be detected.
    """

    module: nn.Module
    x: Tensor
    approximate: str | None
    parameters: list[Tensor]
    versions: list[int | None]
    with_graph: bool
    computed: list[tuple[Tensor, _State | None]]

    @staticmethod
    def of(module: nn.Module, x: Tensor, approximate: str | None) -> ProducerOutput:
        """Return ``module(x)`` without computing it."""
        parameters = _parameters_of(module)
        output: ProducerOutput = _Postpone.apply(x, module, *parameters)
        output.module, output.x, output.approximate, output.parameters = module, x, approximate, parameters
        output.versions = [_version_of(tensor) for tensor in (x, *parameters)]
        output.with_graph, output.computed = torch.is_grad_enabled(), []
        return output

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            changed = args[0].changed() if args[0].computed else None
            return super().__torch_function__(func, types, args, kwargs) if changed is None else func(changed)
        if func is torch.nn.functional.dropout and _drops_nothing(*args, **kwargs):
            return args[0]
        if func is torch.autograd.grad:
            _check_differentiable(*args, **kwargs)
        found: list[tuple[ProducerOutput, Tensor, _State | None]] = []

        def value(output: ProducerOutput) -> Tensor:
            value = output.value()
            found.append((output, value, _state(value)))
            return value

        args, kwargs = torch.utils._pytree.tree_map_only(ProducerOutput, value, (args, kwargs))
        result = func(*args, **kwargs)
        for output, values, state in found:
            if func == _DATA or _is_exposed(result):
                output.computed.append((values, None))
            elif _has_changed(values, state) or _may_change(values, result):
                output.computed.append((values, state))
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(
            f"{func} was called on the output of a fused LayerNorm or GELU, but not by a public function of torch. "
            "Only these compute the values of such an output; undo the fusion with efft.unfuse(model)"
        )

    def value(self) -> Tensor:
        """Compute the ordinary tensor with the module's own forward method. Include changes made in place."""
        changed = self.changed()
        if changed is not None:
            return changed
        with torch.set_grad_enabled(self.with_graph):
            return _compute(self._producer(), self.x)

    def changed(self) -> Tensor | None:
        """Return the computed values if adapted layers must read them instead of computing the output, else None.

        This is the case if another operation has changed the values in place or has changed how autograd treats them,
        or if autograd did not record the call of the producer but records the current operation.
        """
        if not self.with_graph and not self.computed and torch.is_grad_enabled():
            self.computed.append((_Values.apply(self), None))
        if not self.computed:
            return None
        changed = {id(value): value for value, state in self.computed if _has_changed(value, state)}
        if len(changed) > 1:
            raise RuntimeError(
                f"the output of a fused {type(self.module).__name__} was changed in place through several views; "
                "change a copy, or undo the fusion with efft.unfuse(model)"
            )
        return next(iter(changed.values()), None)

    def linear(self, W: Tensor, b: Tensor | None, D: Tensor, G: Tensor) -> Tensor:
        """Compute ``a Wᵀ + b + (a D) G`` ``[..., d_out]`` for the producer's output ``a``, without saving ``a``.

        ``W`` is a plain ``[d_out, d_in]`` tensor. It gets no gradient; ``b`` and a norm's parameters may get gradients.
        """
        changed = self.changed()
        if changed is not None:
            return tt_linear(changed, W, b, D, G)
        if self.approximate is not None:
            self._check_unchanged()
            return tt_gelu_linear(self.x, W, b, D, G, approximate=self.approximate)
        x, norm = self.norm_arguments()
        return tt_norm_linear(x, W=W, b=b, D=D, G=G, **norm)

    def norm_arguments(self) -> tuple[Tensor, dict[str, Any]]:
        """Return the input of the LayerNorm, and its parameters as keyword arguments of an op."""
        norm = self._producer()
        assert isinstance(norm, nn.LayerNorm)
        return self.x, {"gamma": norm.weight, "beta": norm.bias, "eps": norm.eps}

    def _producer(self) -> nn.Module:
        """Return the producer with the parameters that it had when it was called."""
        self._check_unchanged()
        return _with_parameters(self.module, self.parameters)

    def _check_unchanged(self) -> None:
        """Check that the input and the parameters of the producer have not been changed in place since its call."""
        for i, (tensor, version) in enumerate(zip((self.x, *self.parameters), self.versions, strict=True)):
            if version is not None and tensor._version != version:
                raise RuntimeError(
                    f"{'a parameter' if i else 'the input'} of a {type(self.module).__name__} was changed in place "
                    "before its output was used; change a copy, or undo the fusion with efft.unfuse(model)"
                )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ProducerOutput({type(self.module).__name__}, shape={list(self.shape)})"


class _Postpone(torch.autograd.Function):
    """Create a :class:`ProducerOutput`, and serve as its node in the autograd graph.

    An adapted layer computes the producer from its input. Then no gradient reaches this node.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x, *parameters)
        ctx.module = module
        return Tensor._make_wrapper_subclass(ProducerOutput, x.shape, dtype=x.dtype, device=x.device)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        module = _with_parameters(ctx.module, parameters)
        differentiated = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x.view_as(x) if differentiated and x.requires_grad else x.detach().requires_grad_()
            leaves = [x, *(parameter for parameter in parameters if parameter.requires_grad)]
            grads = iter(torch.autograd.grad(_compute(module, x), leaves, gy, create_graph=differentiated))
        dx = next(grads)
        return dx, None, *(next(grads) if parameter.requires_grad else None for parameter in parameters)


class _Values(torch.autograd.Function):
    """Return the values of a :class:`ProducerOutput`, with the gradient that its node in the autograd graph has.

    The node belongs to a custom autograd.Function if this function called the producer, as reentrant checkpointing
    does. If autograd did not record the call of the producer, there is no node.
    """

    @staticmethod
    def forward(ctx: Any, output: ProducerOutput) -> Tensor:
        return output.value()

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Tensor:
        return gy


def _check_differentiable(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> None:
    """Raise an error if ``torch.autograd.grad`` is to compute gradients of values that adapted layers compute."""
    for x in torch.utils._pytree.tree_leaves(inputs):
        if isinstance(x, ProducerOutput) and x.changed() is None:
            raise RuntimeError(
                f"the gradient of the output of a fused {type(x.module).__name__} is not known, because adapted layers "
                "compute this output themselves; call its retain_grad() before they read it, or undo the fusion with "
                "efft.unfuse(model)"
            )


def _parameters_of(module: nn.Module) -> list[Tensor]:
    """Return the parameters of a producer. Without submodules, this takes less time than ``parameters()``."""
    if module._modules:
        return list(module.parameters())
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def _with_parameters(module: nn.Module, parameters: list[Tensor]) -> nn.Module:
    """Return ``module`` if it has these parameters, else a copy that has them.

    ``torch.func.functional_call`` replaces the parameters of a module during the call.
    """
    if all(map(operator.is_, _parameters_of(module), parameters)):
        return module
    if module._modules:
        raise RuntimeError(
            f"the parameters of a {type(module).__name__} were replaced before its output was used; undo the fusion "
            "with efft.unfuse(model)"
        )
    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    probe = copy.copy(module)
    probe.__dict__["_parameters"] = {**module._parameters, **dict(zip(names, parameters, strict=True))}
    return probe


def _compute(module: Any, x: Tensor) -> Tensor:
    # This bypasses the forward method that fuse_producer sets on the module.
    return type(module).forward(module, x)


_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point),
}


def _version_of(value: Tensor) -> int | None:
    return None if value.is_inference() else value._version


_State = tuple[Any, ...]


def _state(value: Tensor) -> _State | None:
    """Return the properties of ``value`` by which a change in place, or of its treatment by autograd, is detected.

    The result is None for inference tensors, whose changes cannot be detected.
    """
    if value.is_inference():
        return None
    storage = value.untyped_storage().data_ptr()
    return value._version, storage, value.requires_grad, value.grad_fn, value._backward_hooks, value.retains_grad


def _has_changed(value: Tensor, state: _State | None) -> bool:
    """Return whether ``value`` may have been changed since it had this state.

    If changes cannot be detected, the function returns True. Later operations then use the same values again.
    """
    return state is None or _state(value) != state


def _is_exposed(result: Any) -> bool:
    """Return whether ``result`` contains an object that may change values in an undetectable way, such as an array."""
    return not all(isinstance(leaf, _PLAIN) for leaf in torch.utils._pytree.tree_leaves(result))


_DATA = getattr(Tensor, "data").__get__  # noqa: B009
_PLAIN = (Tensor, bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout)


def _may_change(value: Tensor, result: Any) -> bool:
    """Return whether ``result`` contains a tensor in the memory of ``value``, through which ``value`` may change."""
    storage = value.untyped_storage().data_ptr()
    tensors = (leaf for leaf in torch.utils._pytree.tree_leaves(result) if type(leaf) is Tensor)
    return any(tensor.layout == torch.strided and tensor.untyped_storage().data_ptr() == storage for tensor in tensors)


def _drops_nothing(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    return isinstance(input, ProducerOutput) and (p == 0 or not training)


def fuse_producer(module: nn.Module) -> bool:
    """Make ``module`` postpone its computation, so that the adapted layer after the module performs it.

    The module still computes its output itself in compiled, exported and traced code, in the transforms of
    ``torch.func``, if its input is an inference tensor or of a subclass of Tensor, and while it has forward or backward
    hooks. This is also the case if the class of the module has another forward method than when it was fused.

    Returns:
        Whether the module was fused. It must be a LayerNorm over one dimension, an instance of a subclass that computes
        the same, or a module that computes a GELU. Otherwise nothing is changed. This also holds if the module is fused
        already, or if its ``forward`` was replaced on the instance.
    """
    if "forward" in module.__dict__:
        return False
    if isinstance(module, nn.LayerNorm):
        approximate = None
        if len(module.normalized_shape) != 1 or not _computes(module, nn.LayerNorm.forward, _random(module)):
            return False
    else:
        approximate = _gelu_of(module)
        if approximate is None:
            return False
    module.__dict__["forward"] = functools.partial(
        _forward, module, approximate=approximate, method=type(module).forward
    )
    return True


def _gelu_of(module: nn.Module) -> str | None:
    """Return which GELU the module computes, "none" or "tanh" as in ``torch.nn.functional.gelu``; None if it does not.

    Libraries have their own classes for the GELU. Such a class has "gelu" in its name. The function therefore calls no
    other modules, whose calls may have effects.
    """
    x = _random(module)
    if isinstance(module, nn.GELU):
        return module.approximate if _computes(module, nn.GELU.forward, x) else None
    if "gelu" not in type(module).__name__.lower() or module._parameters or module._buffers or module._modules:
        return None
    for approximate in ("none", "tanh"):
        if _computes(module, functools.partial(_gelu, approximate=approximate), x):
            return approximate
    return None


def _gelu(module: nn.Module, x: Tensor, *, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate)


def _random(module: nn.Module) -> Tensor:
    """Return random inputs ``[2, 3, width]`` of a LayerNorm or a GELU. Some of those of a GELU are large."""
    width = module.normalized_shape[0] if isinstance(module, nn.LayerNorm) else 8
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x if isinstance(module, nn.LayerNorm) else x * torch.tensor([1, 1, 1, 1, 3, 10, 100, 1000])


def _computes(module: Any, formula: Callable[[Any, Tensor], Tensor], x: Tensor) -> bool:
    """Return whether the forward method of ``module`` computes the same as ``formula`` for the input ``x``.

    A subclass with its own forward method may compute something else, such as a LayerNorm that adds 1 to its weight.
    The function therefore replaces the parameters by random numbers.
    """
    if type(module).forward is formula:
        return True
    generator = torch.Generator().manual_seed(1)
    probe = copy.copy(module)
    probe.__dict__["_parameters"] = {
        name: None if value is None else torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in module._parameters.items()
    }
    try:
        with torch.no_grad():
            got = type(module).forward(probe, x.clone())
            expected = formula(probe, x)
    except Exception:  # the method needs something that the probe lacks, or an input of another shape
        return False
    # Modules that compute in fp32 are plain as well.
    return got.shape == expected.shape and torch.allclose(got.to(torch.float64), expected, rtol=1e-4, atol=1e-4)


def unfuse_producer(module: nn.Module) -> None:
    """Undo :func:`fuse_producer`. Leave other modules unchanged."""
    if replaced_forward(module, _forward) is not None:
        del module.__dict__["forward"]


def replaced_forward(module: nn.Module, function: Callable[..., Any]) -> functools.partial[Any] | None:
    """Return the partial call of ``function`` that replaces the forward method of this instance, or None."""
    forward = module.__dict__.get("forward")
    return forward if isinstance(forward, functools.partial) and forward.func is function else None


def approximation(module: nn.Module) -> str | None:
    """Return which GELU a fused module computes, "none" or "tanh"; None for a LayerNorm and for other modules."""
    forward = replaced_forward(module, _forward)
    if forward is None or forward.keywords["method"] is not type(module).forward:
        return None
    if isinstance(module, nn.GELU):
        return module.approximate  # may have changed since the module was fused
    found: str | None = forward.keywords.get("approximate")
    return found


def _forward(module: Any, *args: Any, approximate: str | None, method: Any, **kwargs: Any) -> Any:
    """Postpone the computation of ``module`` if nothing else needs its output.

    ``method`` is the forward method that :func:`fuse_producer` has examined. If the class of the module has another one
    now, the module may compute something else.
    """
    x = args[0] if len(args) == 1 and not kwargs else None
    if (
        type(module).forward is not method
        or is_transformed()
        or type(x) is not Tensor
        or x.is_inference()
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return type(module).forward(module, *args, **kwargs)
    if isinstance(module, nn.GELU):
        approximate = module.approximate  # may have changed since the module was fused
    return ProducerOutput.of(module, x, approximate)
