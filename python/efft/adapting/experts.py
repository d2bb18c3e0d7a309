"""Adapt the mixtures of experts of transformers, whose matrices are three-dimensional parameters.

Modules are recognized by their attributes and parameters. This module does not import transformers. It supports three
kinds of modules:

- Experts whose forward transformers dispatches to one of several implementations (``eager``, ``grouped_mm``,
  ``batched_mm``, ...), according to ``config._experts_implementation``. Examples are Mixtral, Qwen3-MoE, OLMoE,
  GraniteMoE, DeepSeek, GPT-OSS and about sixty more. Attributes of the experts (``has_gate``, ``is_transposed``, ...)
  describe their computation, so a single implementation, :class:`DispatchedExperts`, suffices for all of them. It adds
  the update to each product. While an update is active, it runs instead of the implementation that transformers chose.
- Modules that compute one product of a mixture (:class:`ParallelExperts`). The arguments of their forward are the
  input, whose rows are sorted by expert, and the number of rows for each expert. Examples are JetMoE, and GraniteMoE
  before transformers 5.
- Other modules that have the same parameters and their own forward. When they read a parameter, they get the effective
  weights of all experts, which include the update. If they multiply by all matrices in one batched product (Llama 4),
  low-rank products add the update. Otherwise (Step 3) every forward pass builds dense weights, which costs time and
  memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from efft_kernels import ExpertWeight, Routing, Site, TTFactors, expert_linear
from efft_kernels.nn import parameter as parameters
from efft_kernels.nn.adapt import adapt
from efft_kernels.nn.experts import EXPERT_VIEWS, holds_numbers
from efft_kernels.nn.frozen import is_plain, stored_in
from efft_kernels.nn.parameter import AdaptedModule, runs_for


@dataclass(frozen=True)
class ExpertParameter:
    """Describe one parameter that contains the matrices of all experts.

    Attributes:
        name: the name of the parameter in its module.
        d_in, d_out: the sizes of each expert's matrix.
        blocks: the number of matrices side by side in each expert's matrix: 2 if it contains gate and value, else 1.
        interleaved: whether the outputs of the blocks alternate.
        transposed: whether the parameter is stored as ``[experts, d_in, d_out]`` instead of ``[experts, d_out, d_in]``.
        second: whether the parameter belongs to the second product of the experts, after the activation. If both
            products share a tensor train, the second one uses the transposed train.
    """

    name: str
    d_in: int
    d_out: int
    blocks: int = 1
    interleaved: bool = False
    transposed: bool = False
    second: bool = False

    @property
    def view(self) -> str:
        """The view with which :func:`efft_kernels.nn.adapt.adapt` reads the parameter."""
        return EXPERT_VIEWS[self.transposed]


@dataclass(frozen=True)
class Experts:
    """Describe a module of experts for a plan.

    Attributes:
        n_experts: the number of experts.
        parameters: the parameters that can be adapted.
        kind: the class that becomes a base class of the module's class when the module is adapted; None if the module
            reads effective weights.
    """

    n_experts: int
    parameters: tuple[ExpertParameter, ...]
    kind: type[AdaptedModule] | None


def experts_of(module: nn.Module) -> Experts | None:
    """Return the experts that ``module`` holds as three-dimensional parameters.

    Return None if the module has no experts, or if they are adapted or quantized.
    """
    found = _gated(module) or _parallel(module)
    adapted = getattr(module, "adapted_parameters", {})
    return None if found is not None and any(p.name in adapted for p in found.parameters) else found


def intercept(module: nn.Module) -> bool:
    """Register a forward that adds the updates of the experts in ``module``.

    The module uses this forward once :func:`efft_kernels.nn.adapt.adapt` has adapted it.

    Returns:
        Whether the forward of this module can be replaced. If not, the module will read effective weights, which
        include the updates.

    Raises:
        TypeError: a forward was set on the module itself.
    """
    if "forward" in module.__dict__:
        raise TypeError("a forward was set on the module itself, which would drop the update; undo that first")
    found = experts_of(module)
    if found is None or found.kind is None:
        return False
    runs_for(type(module).forward)(found.kind)
    return True


def adapt_experts(module: nn.Module, sites: Mapping[str, tuple[TTFactors, Site]]) -> dict[str, ExpertWeight]:
    """Adapt experts in place. The module stays the same object with the same names, and its parameters are frozen.

    :func:`efft_kernels.nn.parameter.restore_module` undoes this.

    Args:
        module: a module whose experts :func:`experts_of` finds.
        sites: maps the name of each parameter to its bank and to the part of the bank that it uses.

    Returns:
        The updates, by the name of the parameter.

    Raises:
        TypeError: the module has no experts that can be adapted.
        ValueError: a site does not fit its parameter, or a parameter does not exist. The module is then unchanged.
    """
    found = experts_of(module)
    if found is None:
        raise TypeError(
            "expected experts as three-dimensional parameters, of a kind that efft.adapting.experts describes and "
            f"not adapted yet, got {type(module).__name__}"
        )
    known = {parameter.name: parameter for parameter in found.parameters}
    if not sites or set(sites) - set(known):
        raise ValueError(f"{type(module).__name__}: expected some of {sorted(known)}, got {sorted(sites)}")
    intercept(module)
    weights: Mapping[str, Any] = adapt(module, sites, views={name: known[name].view for name in sites})
    for parameter in module.parameters(recurse=False):
        parameter.requires_grad_(False)
    return dict(weights)


class AdaptedExperts(AdaptedModule):
    """Serve as the base class of modules of experts whose forward includes the updates of their parameters."""

    prefix = "Efft"

    def live_updates(self) -> dict[str, ExpertWeight]:
        """Return the active updates by the name of the parameter."""
        found = self.adapted_parameters.items()
        return {name: weight for name, weight in found if isinstance(weight, ExpertWeight) and weight.live}

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, made_from, *state = super().__reduce_ex__(protocol)
        return _empty, made_from, *state


class DispatchedExperts(AdaptedExperts):
    """Compute experts whose forward transformers dispatches."""

    # The decorator of transformers guarantees that such classes have these attributes.
    num_experts: int
    has_gate: bool
    has_bias: bool
    act_fn: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
        """Map ``[tokens, d]`` to ``[tokens, d]``, given the chosen experts and their weights, both ``[tokens, k]``."""
        live = self.live_updates()
        if not live:
            return super().forward(hidden_states, top_k_index, top_k_weights)  # type: ignore[misc]
        if getattr(self, "_is_expert_parallel", False):
            raise RuntimeError("these experts were split over several devices after they were adapted: adapt them last")
        routing = Routing.of(top_k_index, self.num_experts)

        def product(name: str, x: Tensor, tokens: Tensor | None = None) -> Tensor:
            W = stored_in(self, name)  # type: ignore[arg-type]
            W = W if getattr(self, "is_transposed", False) else W.transpose(1, 2)
            bias = getattr(self, f"{name}_bias")[routing.experts] if self.has_bias else None
            y = expert_linear(x if tokens is None else x[tokens], W, routing.offsets, bias)
            return live[name].add_update(y, x, routing.offsets, tokens) if name in live else y

        y = product("gate_up_proj" if self.has_gate else "up_proj", hidden_states, routing.tokens)
        y = product("down_proj", self._apply_gate(y) if self.has_gate else self.act_fn(y))
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)
        return routing.combine(y, top_k_weights).to(hidden_states.dtype)


class ParallelExperts(AdaptedExperts):
    """Compute one product of a mixture of experts."""

    def forward(self, inputs: Tensor, expert_size: Any) -> Any:
        """Map ``[rows, d_in]``, sorted by expert, to ``[rows, d_out]``. Expert e has ``expert_size[e]`` rows."""
        live = self.live_updates()
        if not live:
            return super().forward(inputs, expert_size)  # type: ignore[misc]
        offsets = torch.as_tensor(expert_size, device=inputs.device).cumsum(0).to(torch.int32)
        y = expert_linear(inputs, stored_in(self, "weight").transpose(1, 2), offsets)  # type: ignore[arg-type]
        return live["weight"].add_update(y, inputs, offsets)


def _empty(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """Create an empty module for unpickling.

    The process may not have adapted such experts yet. The class of their adapted forward is therefore registered first.
    """
    runs_for(base.forward)(DispatchedExperts if _is_dispatched(base) else ParallelExperts)
    return parameters._empty(base, names)


def _is_dispatched(kind: type[nn.Module]) -> bool:
    """Return whether transformers may dispatch the forward of this class."""
    return hasattr(kind.forward, "__wrapped__") and len(inspect.signature(kind.forward).parameters) == 4


def _gated(module: nn.Module) -> Experts | None:
    """Find experts with two products: up (gate and value, or only the value) and, after the activation, down."""
    first = "gate_up_proj" if "gate_up_proj" in module._parameters else "up_proj"
    up, down = module._parameters.get(first), module._parameters.get("down_proj")
    if up is None or down is None or not (_holds_matrices(up) and _holds_matrices(down)) or len(up) != len(down):
        return None
    blocks = 2 if first == "gate_up_proj" else 1
    ways = [transposed for transposed in (False, True) if _fit(up, down, blocks, transposed)]
    promised = all(hasattr(module, name) for name in ("num_experts", "has_gate", "has_bias", "config"))
    if promised and getattr(module, "is_transposed", None) in ways:
        ways = [bool(module.is_transposed)]  # for square matrices, the sizes alone do not determine the layout
    if len(ways) != 1:
        return None
    (transposed,) = ways
    (d_in, inner), (d_down, d_out) = (weight.shape[1:] if transposed else weight.shape[:0:-1] for weight in (up, down))
    interleaved = blocks > 1 and not getattr(module, "is_concatenated", True)
    intercepted = promised and _is_dispatched(type(module)) and module.num_experts == len(up)
    return Experts(
        len(up),
        (
            ExpertParameter(first, d_in, inner, blocks, interleaved, transposed),
            ExpertParameter("down_proj", d_down, d_out, transposed=transposed, second=True),
        ),
        DispatchedExperts if intercepted else None,
    )


def _fit(up: Tensor, down: Tensor, blocks: int, transposed: bool) -> bool:
    """Return whether the sizes of the two products match if the parameters are stored in this layout."""
    (d_in, inner), (d_down, d_out) = (weight.shape[1:] if transposed else weight.shape[:0:-1] for weight in (up, down))
    return inner == blocks * d_down and d_in == d_out


def _parallel(module: nn.Module) -> Experts | None:
    weight = module._parameters.get("weight")
    if weight is None or len(module._parameters) != 1 or not _holds_matrices(weight):
        return None
    sizes = tuple(getattr(module, name, None) for name in ("num_experts", "output_size", "input_size"))
    called = list(inspect.signature(type(module).forward).parameters)[1:]
    if sizes != tuple(weight.shape) or called != ["inputs", "expert_size"]:
        return None
    return Experts(len(weight), (ExpertParameter("weight", weight.shape[2], weight.shape[1]),), ParallelExperts)


def _holds_matrices(weight: Tensor) -> bool:
    return weight.dim() == 3 and holds_numbers(weight) and is_plain(weight)
