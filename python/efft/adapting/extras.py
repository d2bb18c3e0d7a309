"""Copy and restore the values that trained biases and norms have in the base model.

*Extras* are the biases and the parameters of normalization layers that are trained in addition to the factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from efft.adapting.sharding import check_not_zeros, copy_whole_, reshard
from efft.adapting.wrappers import plain_name

Place = tuple[nn.Module, str]


def parameters_of(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """Return the parameters of the model with the given names.

    Raises:
        ValueError: the model has no parameter with one of the names.
    """
    return {name: module._parameters[key] for name, ((module, key), *_) in _places(model, names).items()}  # type: ignore


def snapshot(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return copies of the parameters with the given names."""
    return {name: parameter.detach().clone() for name, parameter in parameters_of(model, names).items()}


def check_known(model: nn.Module, base: Mapping[str, Tensor]) -> None:
    """Check that ``base``, a :func:`snapshot`, contains values, and that the model still has the parameters.

    Raises:
        ValueError: a parameter is missing, or its base value is unknown. The value is unknown if the model was on the
            meta device at the time of the snapshot and did not get its values by ``load_state_dict``.
    """
    parameters = parameters_of(model, base)
    unknown = [name for name, value in base.items() if value.is_meta and not parameters[name].is_meta]
    if unknown:
        raise ValueError(
            f"the base's values of {unknown[0]!r} are not known, because the model was on the meta device in "
            "efft.apply: load the base with load_state_dict, or adapt the model after it has its weights"
        )


@torch.no_grad()
def put_back(model: nn.Module, base: Mapping[str, Tensor]) -> None:
    """Restore the values of ``base``, a :func:`snapshot`, exactly and in place."""
    for name, parameter in parameters_of(model, base).items():
        if not parameter.is_meta:
            parameter.copy_(base[name])


@contextmanager
def as_in_base(model: nn.Module, base: Mapping[str, Tensor]) -> Iterator[None]:
    """Give the parameters the values of ``base``, a :func:`snapshot`, within the ``with`` block.

    The model gets other parameter objects for that time, so that autograd graphs that already exist are not affected.
    If the model is sharded by ``fully_shard``, which keeps track of the parameter objects, the values are copied into
    the existing parameters instead, and the trained values are copied back after the block.

    Raises:
        ValueError: DeepSpeed's ZeRO-3 manages the parameters, or a base value is not known (:func:`check_known`).
    """
    if base:
        check_not_zeros(model, "disabled")
        reshard(model)  # while parameters are gathered, modules do not hold their shards
    check_known(model, base)
    places, parameters = _places(model, base), parameters_of(model, base)
    sharded = {name: p for name, p in parameters.items() if hasattr(p, "full_tensor")}
    trained = {name: p.detach().clone() for name, p in sharded.items()}
    if sharded:
        reshard(model)  # gathered parameters would keep the trained values
    _copy(sharded, base)
    for name in base.keys() - sharded.keys():
        stand_in = nn.Parameter(base[name].to(parameters[name], copy=True), requires_grad=False)
        for module, key in places[name]:
            module._parameters[key] = stand_in
    try:
        yield
    finally:
        if sharded:
            reshard(model)
        for name, parameter in sharded.items():
            with torch.no_grad():
                parameter.copy_(trained[name])
        for name in base.keys() - sharded.keys():
            for module, key in places[name]:
                module._parameters[key] = parameters[name]


@torch.no_grad()
def _copy(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        copy_whole_(parameter, values[name])


def _places(model: nn.Module, names: Iterable[str]) -> dict[str, list[Place]]:
    """Return the places (module, name) of each parameter. A parameter that several modules share has several places."""
    wanted = dict.fromkeys(names)
    if not wanted:
        return {}
    own: dict[str, Place] = {}
    same: dict[int, list[Place]] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                own[plain_name(f"{prefix}.{key}" if prefix else key)] = module, key
                same.setdefault(id(parameter), []).append((module, key))
    missing = [name for name in wanted if name not in own]
    if missing:
        raise ValueError(
            f"this {type(model).__name__} has no parameter {missing[0]!r}, which was trained in addition to the "
            "factors: undo the change of its module after efft.apply (a parametrization, a replaced layer)"
        )
    return {
        name: [own[name], *(p for p in same[id(own[name][0]._parameters[own[name][1]])] if p != own[name])]
        for name in wanted
    }
