"""Register baselines by name.

A baseline is a fine-tuning method to compare with. It is a function that adapts a model in place. The parameters of the
function after the model are the settings of the baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

from torch import nn

from efft_lab import typed

Apply = TypeVar("Apply", bound=Callable[..., nn.Module])

#: Maps the name of each baseline to the function that applies the baseline.
METHODS: dict[str, Callable[..., nn.Module]] = {}


def baseline(name: str) -> Callable[[Apply], Apply]:
    """Return a decorator that registers a function ``apply(model, **settings)`` as a baseline.

    All parameters of the function need type hints. All parameters except ``model`` are settings and need defaults.
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
    """Raise an error for settings that are invalid for every model.

    Raises:
        ValueError: the baseline has no such setting, a value has the wrong type, or an integer is less than 1.
    """
    known = settings_of(name)
    unknown = sorted(settings.keys() - known.keys())
    if unknown:
        raise ValueError(
            f"method {name!r} has no setting {', '.join(map(repr, unknown))}; it has: {', '.join(known) or 'none'}"
        )
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
