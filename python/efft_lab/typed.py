"""Check values from JSON files against the type hints of the fields for which they are given."""

from __future__ import annotations

import types
from collections.abc import Collection, Iterable, Sequence, Set
from typing import Any, Literal, Union, get_args, get_origin

from efft.config import is_number, quote
from efft.hints import did_you_mean

_NAMES: dict[Any, str] = {
    bool: "true or false",
    dict: "an object",
    float: "a number",
    int: "an integer",
    list: "a list",
    str: "a string",
    type(None): "nothing",
    Sequence: "a list",
}


def check(where: str, value: object, hint: Any) -> None:
    """Raise an error for a value that is not of type ``hint``.

    For the hint ``float``, every finite number is accepted, integers included. True and False are accepted neither for
    ``int`` nor for ``float``.

    Args:
        where: name of the field in the error message.
        value: the value.
        hint: type hint of the field. Lists, unions and ``Literal`` are supported.

    Raises:
        ValueError: the value has another type. The message begins with ``where`` and names the expected type.
    """
    if not _fits(value, hint):
        raise ValueError(f"{where} must be {_description(hint)}, got {quote(value)}")


def check_names(where: str, given: Iterable[Any], known: Collection[str], what: str = "field") -> None:
    """Raise an error for names that are not known.

    Args:
        where: place of the names, for the error message.
        given: the names to check.
        known: the names that are allowed.
        what: kind of the names, for the error message.

    Raises:
        ValueError: a name is unknown. The message gives the most similar known name. If no known name is similar, the
            message lists the known names (at most 30).
    """
    for name in given:
        if name not in known:
            names = sorted(known) if isinstance(known, Set) else known
            raise ValueError(f"unknown {what} {quote(name)} in {where}; {did_you_mean(name, names)}")


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint) or hint
    if origin is Literal:
        return value in get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, each) for each in get_args(hint))
    if origin in (int, float):
        return type(value) is int if origin is int else is_number(value)
    if origin in (list, Sequence):
        each = (*get_args(hint), Any)[0]
        return isinstance(value, (list, tuple)) and (each is Any or all(_fits(item, each) for item in value))
    return isinstance(value, origin)


def _description(hint: Any) -> str:
    origin = get_origin(hint) or hint
    if origin is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(_description, get_args(hint)))
    if origin in (list, Sequence) and get_args(hint):
        return f"a list, each entry {_description(get_args(hint)[0])}"
    return _NAMES.get(origin) or f"of type {origin.__name__}"
