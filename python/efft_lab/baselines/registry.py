"""Register baselines by name. The settings of a baseline are the keyword parameters of its function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

from torch import nn

from efft_lab import typed

Apply = TypeVar("Apply", bound=Callable[..., nn.Module])

#: Maps the name of each baseline to the function that applies the baseline.
METHODS: dict[str, Callable[..., nn.Module]] = {}


def baseline(name: str) -> Callable[[Apply], Apply]:
    """Register ``apply(model, **settings)`` as a baseline.

    The settings are the keyword parameters of the function, which need type hints and defaults.
    """

    def register(function: Apply) -> Apply:
        METHODS[name] = function
        return function

    return register


def names() -> list[str]:
    """Return the names of the baselines."""
    return list(METHODS)


def settings_of(name: str) -> dict[str, Any]:
    """Return a mapping from the name of each setting of a baseline to its type."""
    hints = get_type_hints(METHODS[name])
    return {setting: hint for setting, hint in hints.items() if setting not in ("model", "return")}


def check(name: str, settings: Mapping[str, Any]) -> None:
    """Raise an error for settings that a baseline cannot have with any model.

    Raises:
        ValueError: the baseline has no such setting, or a value has the wrong type.
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
    """Apply a baseline by name, in place.

    Raises:
        ValueError: :func:`check` rejects the settings, or the baseline does not support the model.
    """
    check(name, settings)
    return METHODS[name](model, **settings)
