"""Mixtures of experts of transformers, whose matrices are three-dimensional parameters.

Modules are recognized by what they are made of; transformers itself is not imported.

- Experts whose forward transformers dispatches to one of several implementations (``eager``, ``grouped_mm``,
  ``batched_mm``, ...), by ``config._experts_implementation``: Mixtral, Qwen3-MoE, OLMoE, GraniteMoE, DeepSeek, GPT-OSS
  and about sixty more. Attributes of the module (``has_gate``, ``is_transposed``, ...) state what an implementation may
  rely on, so one implementation here serves them all: it adds the update to each product. While an update is live it
  runs instead of the chosen implementation.
- One product of a mixture (``ParallelExperts``, called with its rows sorted by expert and the number of rows of each):
  JetMoE, and GraniteMoE before transformers 5.
- Other modules with the same parameters and their own forward read the effective weights of all experts. For a batch of
  products with them (Llama 4) the update stays of low rank. Elsewhere (Step 3) every pass makes dense weights, which
  costs time and memory.
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
    """One parameter with the matrices of all experts.

    Attributes:
        name: the name of the parameter in its module.
        d_in, d_out: the sizes of each expert's matrix.
        blocks: the number of matrices side by side in its output: 2 if gate and value are one parameter, else 1.
        interleaved: whether the outputs of the blocks alternate.
        transposed: whether it is stored as ``[experts, d_in, d_out]`` instead of ``[experts, d_out, d_in]``.
        second: whether its input is the output of the mixture's first product. If the two share a train, its site is
            the transposed one.
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
        """How :func:`efft_kernels.nn.adapt.adapt` is to read the parameter."""
        return EXPERT_VIEWS[self.transposed]


@dataclass(frozen=True)
class Experts:
    """What a plan must know of a module of experts.

    Attributes:
        n_experts: the number of experts.
        parameters: the parameters that can be adapted.
        kind: the second base of the module's class once it is adapted; None if it reads effective weights.
    """

    n_experts: int
    parameters: tuple[ExpertParameter, ...]
    kind: type[AdaptedModule] | None


def experts_of(module: nn.Module) -> Experts | None:
    """Return the experts that ``module`` holds as three-dimensional parameters.

    None if there are none, or if they are adapted or quantized.
    """
    found = _gated(module) or _parallel(module)
    adapted = getattr(module, "adapted_parameters", {})
    return None if found is not None and any(p.name in adapted for p in found.parameters) else found


def intercept(module: nn.Module) -> bool:
    """Let experts run a forward that knows their updates once :func:`efft_kernels.nn.adapt.adapt` has adapted them.

    Returns:
        False if nothing can be done: the module then reads effective weights.

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

    :func:`efft_kernels.nn.parameter.restore_module` undoes it.

    Args:
        module: a module whose experts :func:`experts_of` finds.
        sites: the bank that the update comes from, and the part of it, by the name of the parameter.

    Returns:
        The updates, by the name of the parameter.

    Raises:
        TypeError: there are no experts that can be adapted.
        ValueError: a site does not fit its parameter, or there is no such parameter. The module is then unchanged.
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
    """A module of experts with updates of its parameters, whose forward knows them."""

    prefix = "Efft"

    def live_updates(self) -> dict[str, ExpertWeight]:
        """Return the updates that count now, by the name of the parameter."""
        found = self.adapted_parameters.items()
        return {name: weight for name, weight in found if isinstance(weight, ExpertWeight) and weight.live}

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, made_from, *state = super().__reduce_ex__(protocol)
        return _empty, made_from, *state


class DispatchedExperts(AdaptedExperts):
    """Experts as transformers dispatches them."""

    # Transformers' decorator of such classes promises these:
    num_experts: int
    has_gate: bool
    has_bias: bool
    act_fn: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
        """``[tokens, d] -> [tokens, d]``; the router's choice and weights are ``[tokens, k]``."""
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
    """One product of a mixture of experts."""

    def forward(self, inputs: Tensor, expert_size: Any) -> Any:
        """``[rows, d_in] -> [rows, d_out]``; rows are sorted by expert, and ``expert_size`` counts the rows of each."""
        live = self.live_updates()
        if not live:
            return super().forward(inputs, expert_size)  # type: ignore[misc]
        offsets = torch.as_tensor(expert_size, device=inputs.device).cumsum(0).to(torch.int32)
        y = expert_linear(inputs, stored_in(self, "weight").transpose(1, 2), offsets)  # type: ignore[arg-type]
        return live["weight"].add_update(y, inputs, offsets)


def _empty(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """Make an empty module for pickle: in another process, such experts may not have been adapted yet."""
    runs_for(base.forward)(DispatchedExperts if _is_dispatched(base) else ParallelExperts)
    return parameters._empty(base, names)


def _is_dispatched(kind: type[nn.Module]) -> bool:
    """Whether modules of this class may be those whose forward transformers dispatches."""
    return hasattr(kind.forward, "__wrapped__") and len(inspect.signature(kind.forward).parameters) == 4


def _gated(module: nn.Module) -> Experts | None:
    """Find two products with an activation between them: up (gate and value, or the value alone), and down again."""
    first = "gate_up_proj" if "gate_up_proj" in module._parameters else "up_proj"
    up, down = module._parameters.get(first), module._parameters.get("down_proj")
    if up is None or down is None or not (_holds_matrices(up) and _holds_matrices(down)) or len(up) != len(down):
        return None
    blocks = 2 if first == "gate_up_proj" else 1
    ways = [transposed for transposed in (False, True) if _fit(up, down, blocks, transposed)]
    promised = all(hasattr(module, name) for name in ("num_experts", "has_gate", "has_bias", "config"))
    if promised and getattr(module, "is_transposed", None) in ways:
        ways = [bool(module.is_transposed)]  # the module says so; square matrices do not show it
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
    """Whether the sizes of the two products fit together if the parameters are stored this way."""
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
