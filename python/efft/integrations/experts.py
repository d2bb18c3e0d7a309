"""Mixtures of experts of transformers, whose matrices are three-dimensional parameters.

Two kinds of modules are recognized by what they are made of; transformers itself is not imported.

- Experts whose forward transformers dispatches to one of several implementations (``eager``, ``grouped_mm``,
  ``batched_mm``, ...), by ``config._experts_implementation``: Mixtral, Qwen3-MoE, OLMoE, GraniteMoE, DeepSeek, GPT-OSS
  and some sixty more. What an implementation may rely on is stated by attributes of the module (``has_gate``,
  ``is_transposed``, ...), so one implementation serves them all: it adds the update to the products in between. It runs
  whichever one is chosen, as long as an update is live; the chosen one runs otherwise.
- One product of a mixture (``ParallelExperts``, called with its rows sorted by expert and their numbers): JetMoE, and
  GraniteMoE before transformers 5. The module goes on computing the product, and the update comes beside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from efft_kernels import ExpertWeight, Routing, Site, TTFactors, expert_linear


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


@dataclass(frozen=True)
class Experts:
    """What a plan must know of a module of experts.

    Attributes:
        n_experts: how many there are.
        parameters: those that can be adapted.
    """

    n_experts: int
    parameters: tuple[ExpertParameter, ...]


def experts_of(module: nn.Module) -> Experts | None:
    """The experts that ``module`` holds as three-dimensional parameters, or None where there are none, or none that
    :func:`adapt_experts` can adapt."""
    if isinstance(module, AdaptedExperts):
        return None
    return _dispatched(module) or _parallel(module)


def adapt_experts(module: nn.Module, sites: Mapping[str, tuple[TTFactors, Site]]) -> dict[str, ExpertWeight]:
    """Adapt experts in place, so that whatever refers to the module goes on doing so.

    The module becomes of a class made from its own and :class:`AdaptedExperts`; its parameters are frozen and keep
    their names.

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
            f"expected experts as three-dimensional parameters, of a kind that efft.integrations.experts describes and "
            f"not adapted yet, got {type(module).__name__}"
        )
    if "forward" in module.__dict__:
        raise TypeError("a forward was set on the module itself, which would drop the update; undo that first")
    known = {parameter.name: parameter for parameter in found.parameters}
    if not sites or set(sites) - set(known):
        raise ValueError(f"{type(module).__name__}: expected some of {sorted(known)}, got {sorted(sites)}")
    before = {name: parameter.requires_grad for name, parameter in module.named_parameters(recurse=False)}
    weights: dict[str, ExpertWeight] = {}
    try:
        for name, (factors, site) in sites.items():
            weights[name] = ExpertWeight(module, name, factors, site, transposed=known[name].transposed)
    except ValueError:
        for name, weight in weights.items():
            weight.release()
            weight.weight.requires_grad_(before[name])
        raise
    for parameter in module.parameters(recurse=False):
        parameter.requires_grad_(False)
    module.__class__ = _of_both(DispatchedExperts if _dispatched(module) else ParallelExperts, type(module))
    module.__dict__["efft_weights"] = weights
    return weights


def restore_experts(module: nn.Module) -> None:
    """Undo :func:`adapt_experts`: the module is of its own class again, its parameters as they were, and frozen."""
    assert isinstance(module, AdaptedExperts)
    for weight in module.efft_weights.values():
        weight.release()
    del module.__dict__["efft_weights"]
    module.__class__ = module.plain  # type: ignore[assignment]


class AdaptedExperts(nn.Module):
    """A module of experts with updates of its parameters; its class is made from this one and its own."""

    efft_weights: dict[str, ExpertWeight]
    """The updates by name of the parameter."""
    plain: type[nn.Module]
    """The module's own class."""

    def extra_repr(self) -> str:
        return "\n".join([super().extra_repr(), *map(repr, self.efft_weights.values())]).strip()


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
        if not any(weight.live for weight in self.efft_weights.values()):
            return super().forward(hidden_states, top_k_index, top_k_weights)
        if getattr(self, "_is_expert_parallel", False):
            raise RuntimeError("these experts were split over several devices after they were adapted: adapt them last")
        routing = Routing.of(top_k_index, self.num_experts)
        y = self._product("gate_up_proj" if self.has_gate else "up_proj", hidden_states, routing, routing.tokens)
        y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
        y = self._product("down_proj", y, routing)
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)
        return routing.combine(y, top_k_weights).to(hidden_states.dtype)

    def _product(self, name: str, x: Tensor, routing: Routing, tokens: Tensor | None = None) -> Tensor:
        """``x W_e + b_e`` of every row ``[rows, d_out]``; ``x`` is ``[rows, d_in]``, or ``[tokens, d_in]`` with the
        token of each row."""
        weight = self.efft_weights.get(name)
        W: Tensor = getattr(self, name)
        bias = getattr(self, f"{name}_bias")[routing.experts] if self.has_bias else None
        rows = x if tokens is None else x[tokens]
        transposed = getattr(self, "is_transposed", False)
        y = expert_linear(rows, W if transposed else W.transpose(1, 2), routing.offsets, bias)
        return weight.add_update(y, x, routing.offsets, tokens) if weight is not None and weight.live else y


class ParallelExperts(AdaptedExperts):
    """One product of a mixture of experts."""

    def forward(self, inputs: Tensor, expert_size: Any) -> Any:
        """``[rows, d_in] -> [rows, d_out]``; rows are sorted by expert, ``expert_size`` is how many each has."""
        y = super().forward(inputs, expert_size)
        weight = self.efft_weights["weight"]
        if not weight.live:
            return y
        sizes = torch.as_tensor(expert_size, device=inputs.device)
        return weight.add_update(y, inputs, sizes.cumsum(0).to(torch.int32))


def _dispatched(module: nn.Module) -> Experts | None:
    first = "gate_up_proj" if getattr(module, "has_gate", None) else "up_proj"
    up, down = module._parameters.get(first), module._parameters.get("down_proj")
    promised = ("num_experts", "has_gate", "has_bias", "config")
    forward = type(module).forward
    if (
        up is None
        or down is None
        or not all(hasattr(module, name) for name in promised)
        or not hasattr(forward, "__wrapped__")
        or len(inspect.signature(forward).parameters) != 4
        or not (_holds_matrices(up) and _holds_matrices(down) and len(up) == len(down) == module.num_experts)
    ):
        return None
    transposed, blocks = bool(getattr(module, "is_transposed", False)), 1 + bool(module.has_gate)
    (d_in, inner), (d_down, d_out) = (w.shape[1:] if transposed else w.shape[:0:-1] for w in (up, down))
    if inner != blocks * d_down:
        return None
    interleaved = blocks > 1 and not getattr(module, "is_concatenated", True)
    return Experts(
        len(up),
        (
            ExpertParameter(first, d_in, inner, blocks, interleaved, transposed),
            ExpertParameter("down_proj", d_down, d_out, transposed=transposed, second=True),
        ),
    )


def _parallel(module: nn.Module) -> Experts | None:
    weight = module._parameters.get("weight")
    if weight is None or len(module._parameters) != 1 or not _holds_matrices(weight):
        return None
    sizes = tuple(getattr(module, name, None) for name in ("num_experts", "output_size", "input_size"))
    parameters = list(inspect.signature(type(module).forward).parameters)[1:]
    if sizes != tuple(weight.shape) or parameters != ["inputs", "expert_size"]:
        return None
    return Experts(len(weight), (ExpertParameter("weight", weight.shape[2], weight.shape[1]),))


def _holds_matrices(weight: Tensor) -> bool:
    return weight.dim() == 3 and weight.is_floating_point() and weight.dtype.itemsize > 1


_of_both_kinds: dict[tuple[type, type], type[AdaptedExperts]] = {}


def _of_both(adapted: type[AdaptedExperts], experts: type[nn.Module]) -> type[AdaptedExperts]:
    """The class of adapted experts of that class."""

    def reduce(self: AdaptedExperts, protocol: object) -> tuple[Any, ...]:  # pickle finds classes by their names alone
        return _empty, (adapted, experts), self.__dict__

    if (adapted, experts) not in _of_both_kinds:
        parts = {"plain": experts, "__reduce_ex__": reduce, "__doc__": adapted.__doc__}
        _of_both_kinds[adapted, experts] = type(f"Efft{experts.__name__}", (adapted, experts), parts)
    return _of_both_kinds[adapted, experts]


def _empty(adapted: type[AdaptedExperts], experts: type[nn.Module]) -> AdaptedExperts:
    kind = _of_both(adapted, experts)
    return kind.__new__(kind)
