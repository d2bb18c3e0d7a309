"""Mixtures of experts of transformers, whose matrices are three-dimensional parameters.

Modules are recognized by what they are made of; transformers itself is not imported.

- Experts whose forward transformers dispatches to one of several implementations (``eager``, ``grouped_mm``,
  ``batched_mm``, ...), by ``config._experts_implementation``: Mixtral, Qwen3-MoE, OLMoE, GraniteMoE, DeepSeek, GPT-OSS
  and some sixty more. What an implementation may rely on is stated by attributes of the module (``has_gate``,
  ``is_transposed``, ...), so one implementation serves them all: it adds the update to the products in between. It runs
  whichever one is chosen, as long as an update is live; the chosen one runs otherwise.
- One product of a mixture (``ParallelExperts``, called with its rows sorted by expert and their numbers): JetMoE, and
  GraniteMoE before transformers 5.
- Others with the same parameters and a forward of their own read the effective weights of all experts. A batch of
  products with them (Llama 4) stays one of low rank; elsewhere (Step 3) they are made densely in every pass, with the
  cost of that in time and memory.
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
from efft_kernels.nn.experts import EXPERT_VIEWS, holds_numbers
from efft_kernels.nn.frozen import is_plain, stored_in
from efft_kernels.nn.parameter import AdaptedModule, put_update, runs_for


@dataclass(frozen=True)
class ExpertParameter:
    """One parameter with the matrices of all experts.

    Attributes:
        name: of the parameter in its module.
        d_in, d_out: sizes of each expert's matrix.
        blocks: matrices beside each other in its output: 2 where gate and value are one parameter, else 1.
        interleaved: their outputs alternate.
        transposed: it is stored as ``[experts, d_in, d_out]``, not ``[experts, d_out, d_in]``.
        second: it takes what the mixture's first product gives: the site to be transposed, where a train is shared.
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
        """The same for :func:`efft_kernels.nn.adapt.adapt`."""
        return EXPERT_VIEWS[self.transposed]


@dataclass(frozen=True)
class Experts:
    """What a plan must know of a module of experts.

    Attributes:
        n_experts: how many there are.
        parameters: those that can be adapted.
        kind: the class that the module is made of too, once it is adapted; None where it reads effective weights.
    """

    n_experts: int
    parameters: tuple[ExpertParameter, ...]
    kind: type[AdaptedModule] | None


def experts_of(module: nn.Module) -> Experts | None:
    """The experts that ``module`` holds as three-dimensional parameters; None where there are none, or they are adapted
    or quantised."""
    found = _gated(module) or _parallel(module)
    adapted = getattr(module, "adapted_parameters", {})
    return None if found is not None and any(p.name in adapted for p in found.parameters) else found


def intercept(module: nn.Module) -> bool:
    """Let experts run a forward that knows their updates, once they are adapted: by :func:`adapt_experts`, which calls
    this, or by :func:`efft_kernels.nn.adapt.adapt`. Returns False where nothing can be done: where the module reads
    effective weights."""
    found = experts_of(module)
    if found is None or found.kind is None:
        return False
    runs_for(type(module).forward)(found.kind)
    return True


def adapt_experts(module: nn.Module, sites: Mapping[str, tuple[TTFactors, Site]]) -> dict[str, ExpertWeight]:
    """Adapt experts in place: the module stays the same object, with the same names, and its parameters are frozen.
    :func:`efft_kernels.nn.parameter.restore_module` undoes it.

    Args:
        module: of which :func:`experts_of` knows the experts.
        sites: name of a parameter to the bank, and the part of it, that the update comes from.

    Returns:
        The updates by name of the parameter.

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
    if "forward" in module.__dict__:
        raise TypeError("a forward was set on the module itself, which would drop the update; undo that first")
    known = {parameter.name: parameter for parameter in found.parameters}
    if not sites or set(sites) - set(known):
        raise ValueError(f"{type(module).__name__}: expected some of {sorted(known)}, got {sorted(sites)}")
    weights = {
        name: ExpertWeight(module, name, factors, site, transposed=known[name].transposed)
        for name, (factors, site) in sites.items()
    }
    intercept(module)
    for weight in weights.values():
        put_update(weight)
    for parameter in module.parameters(recurse=False):
        parameter.requires_grad_(False)
    return weights


class AdaptedExperts(AdaptedModule):
    """A module of experts with updates of its parameters, whose forward knows them."""

    prefix = "Efft"

    def live_updates(self) -> dict[str, ExpertWeight]:
        """The updates that count now, by name of the parameter."""
        found = self.adapted_parameters.items()
        return {name: weight for name, weight in found if isinstance(weight, ExpertWeight) and weight.live}

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, made_from, *state = super().__reduce_ex__(protocol)
        return _empty, made_from, *state


class DispatchedExperts(AdaptedExperts):
    """Experts as transformers dispatches them."""

    # What transformers' decorator of such classes promises:
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
        """``[rows, d_in] -> [rows, d_out]``; rows are sorted by expert, ``expert_size`` is how many each has."""
        live = self.live_updates()
        if not live:
            return super().forward(inputs, expert_size)  # type: ignore[misc]
        offsets = torch.as_tensor(expert_size, device=inputs.device).cumsum(0).to(torch.int32)
        y = expert_linear(inputs, stored_in(self, "weight").transpose(1, 2), offsets)  # type: ignore[arg-type]
        return live["weight"].add_update(y, inputs, offsets)


def _empty(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """For pickle: in another process nobody may have adapted such experts yet."""
    runs_for(base.forward)(DispatchedExperts if _is_dispatched(base) else ParallelExperts)
    return parameters._empty(base, names)


def _is_dispatched(kind: type[nn.Module]) -> bool:
    """Whether modules of this class may be those whose forward transformers dispatches."""
    return hasattr(kind.forward, "__wrapped__") and len(inspect.signature(kind.forward).parameters) == 4


def _gated(module: nn.Module) -> Experts | None:
    """Two products with an activation between them: gate and value, or the value alone, and down again."""
    first = "gate_up_proj" if "gate_up_proj" in module._parameters else "up_proj"
    up, down = module._parameters.get(first), module._parameters.get("down_proj")
    if up is None or down is None or not (_holds_matrices(up) and _holds_matrices(down)) or len(up) != len(down):
        return None
    blocks = 2 if first == "gate_up_proj" else 1
    ways = [transposed for transposed in (False, True) if _fit(up, down, blocks, transposed)]
    promised = all(hasattr(module, name) for name in ("num_experts", "has_gate", "has_bias", "config"))
    if promised and getattr(module, "is_transposed", None) in ways:
        ways = [bool(module.is_transposed)]  # said by the module: of square matrices nothing else tells
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
    """Whether one product goes on from the other where the parameters are stored this way."""
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
