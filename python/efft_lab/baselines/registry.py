"""The registry of baselines: each by its name, with its settings as the parameters of its function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

from torch import nn

from efft_lab import typed

Apply = TypeVar("Apply", bound=Callable[..., nn.Module])

#: Name of a baseline to the function that applies it.
METHODS: dict[str, Callable[..., nn.Module]] = {}


def baseline(name: str) -> Callable[[Apply], Apply]:
    """Registers ``apply(model, **settings)`` as a baseline. The settings are the keyword parameters of the function:
    they need type hints and defaults."""

    def register(function: Apply) -> Apply:
        METHODS[name] = function
        return function

    return register


def names() -> list[str]:
    """Names of the baselines."""
    return list(METHODS)


def settings_of(name: str) -> dict[str, Any]:
    """Name of each setting of a baseline to its type."""
    hints = get_type_hints(METHODS[name])
    return {setting: hint for setting, hint in hints.items() if setting not in ("model", "return")}


def check(name: str, settings: Mapping[str, Any]) -> None:
    """Refuses settings that a baseline cannot have, whatever the model.

    Raises:
        ValueError: a setting that the baseline does not have, or a value of the wrong type.
    """
    known = settings_of(name)
    unknown = sorted(settings.keys() - known.keys())
    if unknown:
        raise ValueError(f"method {name!r} has no setting {', '.join(unknown)}; it has: {', '.join(known) or 'none'}")
    for setting, value in settings.items():
        typed.check(f"{setting} of method {name!r}", value, known[setting])
        if known[setting] is int and value < 1:
            raise ValueError(f"{setting} of method {name!r} must be at least 1, got {value}")


def apply(name: str, model: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    """Applies a baseline by name, in place.

    Raises:
        ValueError: settings that :func:`check` refuses, or a model that the baseline does not fit.
    """
    check(name, settings)
    return METHODS[name](model, **settings)
