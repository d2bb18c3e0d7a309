"""Values of the biases and norms that are trained beside the factors: those of training, and those of the base."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from efft.adapting.sharding import check_not_zeros, copy_whole_, reshard
from efft.adapting.wrappers import plain_name

Place = tuple[nn.Module, str]


def parameters_of(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """Return these parameters of the model, by name.

    Raises:
        ValueError: the model lacks one of them.
    """
    return {name: module._parameters[key] for name, ((module, key), *_) in _places(model, names).items()}  # type: ignore


def snapshot(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return copies of these parameters."""
    return {name: parameter.detach().clone() for name, parameter in parameters_of(model, names).items()}


def check_known(model: nn.Module, base: Mapping[str, Tensor]) -> None:
    """Check that ``base``, a :func:`snapshot`, has values, and the model still has the parameters.

    Raises:
        ValueError: the model lacks one, or was on the meta device then and got its values in a way that nobody saw.
    """
    parameters = parameters_of(model, base)
    unknown = [name for name, value in base.items() if value.is_meta and not parameters[name].is_meta]
    if unknown:
        raise ValueError(
            f"the base's values of {unknown[0]} are not known, since the model was on the meta device in efft.apply: "
            "load the base by load_state_dict, or adapt the model after it has its weights"
        )


@torch.no_grad()
def put_back(model: nn.Module, base: Mapping[str, Tensor]) -> None:
    """Restore the values of ``base``, a :func:`snapshot`, in place and bit for bit."""
    for name, parameter in parameters_of(model, base).items():
        if not parameter.is_meta:
            parameter.copy_(base[name])


@contextmanager
def as_in_base(model: nn.Module, base: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the ``with`` block, let the model have parameters with the values of ``base``, a :func:`snapshot`.

    They are other parameters, so that a graph that was made before is not affected. Those of a model that is sharded by
    ``fully_shard``, which keeps track of its parameters, get the values themselves for that time.
    """
    if base:
        check_not_zeros(model, "disabled")
        reshard(model)  # where parameters are whole now, the modules do not have the shards
    check_known(model, base)
    places, parameters = _places(model, base), parameters_of(model, base)
    sharded = {name: p for name, p in parameters.items() if hasattr(p, "full_tensor")}
    trained = {name: p.detach().clone() for name, p in sharded.items()}
    if sharded:
        reshard(model)  # parameters that are whole now would keep the values of training
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
    """Return where the model has each of these parameters; one that modules share has several places."""
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
            f"this {type(model).__name__} has no parameter {missing[0]!r}, which is trained beside the factors: undo "
            "what was done to its module after efft.apply (a parametrization, another layer in its place)"
        )
    return {
        name: [own[name], *(p for p in same[id(own[name][0]._parameters[own[name][1]])] if p != own[name])]
        for name in wanted
    }
