"""Find the biases and normalization layers to train in addition to the factors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from efft.planning.structure import NORMS, Weight
from efft.planning.targets import known_target
from efft_kernels.nn.frozen import is_plain


class Extras(NamedTuple):
    """Select the biases and norms of a model that are trained in addition to the factors and the head.

    Attributes:
        bias: "none"; "all" (all biases outside the head); "adapted" (the biases of adapted layers); or "auto" (like
            "adapted", but without an error if there are no biases, and without the biases of layers that are known to
            compute queries, keys or values). A bias is a parameter of one dimension that is called ``bias``, or whose
            name ends in ``_bias`` (``in_proj_bias``). "all" leaves out parameters that the model itself does not train:
            those that require no gradient, in a module with other parameters that do (the biases of some routers).
        norms: whether the weights and biases of normalization layers (:func:`is_norm`) are trained.
    """

    bias: str = "none"
    norms: bool = False

    def as_fields(self) -> dict[str, Any]:
        """Return the selection as fields of a configuration."""
        return self._asdict()

    def describe(self) -> str:
        """Return the end of a line of settings, such as ", biases all, norms", or "" if none are trained."""
        return ("" if self.bias == "none" else f", biases {self.bias}") + (", norms" if self.norms else "")


def find_extras(model: nn.Module, wanted: Extras, weights: Mapping[str, Weight], head: Iterable[str]) -> dict[str, int]:
    """Return the parameters to train in addition to the factors and the head, with their number of entries.

    Args:
        model: a model that is not adapted; it may be on the meta device.
        wanted: selection of the parameters.
        weights: the adapted weights.
        head: names of the modules that are trained completely.

    Returns:
        A dict from names to numbers of entries, in the order of the model's modules. A parameter that several modules
        share is included once.

    Raises:
        ValueError: the model has no such parameters, or one of them cannot be trained.
    """
    bias, norms = wanted
    if wanted == Extras():
        return {}
    seen = {id(p) for name in head for p in model.get_submodule(name).parameters()}
    # A softmax does not depend on the bias of the keys, and a bias of the values has the same effect as a bias of the
    # output projection.
    useful = {n: w for n, w in weights.items() if bias != "auto" or known_target(w).role not in ("qkv", "q", "k", "v")}
    of_adapted = _biases_of(model, useful)
    found: dict[str, int] = {}
    kinds = dict.fromkeys(["bias"] * (bias not in ("none", "auto")) + ["norms"] * norms, 0)
    for prefix, module in model.named_modules():
        norm = norms and is_norm(module)
        for own, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            is_wanted_bias = _is_bias(own, parameter) and (
                id(parameter) in of_adapted or (bias == "all" and _is_trained(module, parameter))
            )
            if not (norm or (bias != "none" and is_wanted_bias)):
                continue
            seen.add(id(parameter))
            name = f"{prefix}.{own}".lstrip(".")
            _check_trainable(name, parameter)
            found[name] = parameter.numel()
            for kind, of_kind in (("bias", is_wanted_bias), ("norms", norm)):
                if kind in kinds:
                    kinds[kind] += of_kind
    for kind, n in kinds.items():
        if not n:
            setting = f"bias={bias!r}" if kind == "bias" else "norms=True"
            what = {"norms": "normalization layer with a weight", "adapted": "bias in the adapted layers"}
            raise ValueError(
                f"{setting} finds no {what.get('norms' if kind == 'norms' else bias, 'bias')} to train outside the "
                f"head of this {type(model).__name__}; leave the setting out"
            )
    return found


def known_extras(
    model: nn.Module, names: Iterable[str], weights: Mapping[str, Weight], head: Iterable[str]
) -> dict[str, int]:
    """Return the parameters with the given names from an adapter file, with their number of entries.

    Raises:
        ValueError: a parameter is missing in the model, is adapted, is a part of the head, or cannot be trained.
    """
    names = list(names)
    own = dict(model.named_parameters(remove_duplicate=False)) if names else {}
    apart = {id(p) for name in head for p in model.get_submodule(name).parameters()} if names else set()
    apart |= {id(own.get(f"{weight.module}.{weight.parameter}".lstrip("."))) for weight in weights.values()}
    found: dict[str, int] = {}
    for name in names:
        if name not in own:
            raise ValueError(f"it has no parameter {name!r}, for which the adapter has a value")
        if id(own[name]) in apart:
            raise ValueError(f"{name!r} is a bias or norm of the adapter, but it is adapted or in the head too")
        _check_trainable(name, own[name])
        found[name] = own[name].numel()
    return found


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a normalization layer with parameters.

    All normalization layers of torch are recognized. Another module, such as the RMS norm of a language model, is
    recognized if it is derived from ``nn.Module`` but from no other module class of torch, if it has a plain
    floating-point ``weight``, if all its parameters have exactly one dimension, and if it has no submodules.
    """
    own = [p for p in module._parameters.values() if p is not None]
    if isinstance(module, NORMS):
        return bool(own)
    weight = module._parameters.get("weight")
    if weight is None or module._modules or any(is_lazy(p) or p.dim() != 1 for p in own):
        return False
    of_torch = next(kind for kind in type(module).__mro__ if kind.__module__.startswith("torch."))
    return of_torch is nn.Module and weight.is_floating_point() and is_plain(weight)


def _is_bias(name: str, parameter: Tensor) -> bool:
    return is_name_of_bias(name) and (is_lazy(parameter) or parameter.dim() == 1)


def _is_trained(module: nn.Module, parameter: Tensor) -> bool:
    """Return whether a model trains a parameter of ``module``, as far as ``requires_grad`` tells.

    If no parameter of the module requires a gradient, the user has probably frozen the whole module. The parameter then
    counts as trained.
    """
    return parameter.requires_grad or not any(p.requires_grad for p in module.parameters())


def is_name_of_bias(name: str) -> bool:
    """Return whether a parameter's own name is that of a bias."""
    return name == "bias" or name.endswith("_bias")


def _biases_of(model: nn.Module, weights: Mapping[str, Weight]) -> set[int]:
    """Return the identities of the biases that belong to adapted weights."""
    found = set()
    for weight in weights.values():
        bias = model.get_submodule(weight.module)._parameters.get(weight.parameter.replace("weight", "bias"))
        found |= {id(bias)} if bias is not None and weight.parameter.endswith("weight") else set()
    return found


def _check_trainable(name: str, parameter: Tensor) -> None:
    reason = None
    if is_lazy(parameter):
        reason = "its shape is unknown until the model has run once; run the model first"
    elif not is_plain(parameter) or not parameter.is_floating_point():
        reason = f"it is a {type(parameter).__name__} of {parameter.dtype}; exclude it when you quantize the model"
    if reason is not None:
        raise ValueError(
            f"the setting bias or norms cannot train {name!r}: {reason}, or use bias='none' and norms=False"
        )
