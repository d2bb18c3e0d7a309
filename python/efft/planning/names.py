"""Match the names of layers and weights that a user selects: whole names, endings, or regular expressions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

#: Maximum total length of the regular expressions in a list. Longer expressions indicate a mistake or a damaged file.
MOST_CHARACTERS = 2000

_NAME = re.compile(r"[\w.-]*")


def matcher(pattern: str) -> Callable[[str], bool]:
    """Return a function that checks whether ``pattern`` selects a name.

    A pattern selects a name if it equals the whole name or the part of the name after any dot, or if it matches one of
    these as a regular expression. Python's :mod:`re` can need exponential time for a malicious expression. Use this
    function therefore only for patterns that the user types. Adapter files do not need patterns, because they record
    exact names.

    Raises:
        ValueError: ``pattern`` is neither a name nor a regular expression.
    """
    try:
        expression = re.compile(pattern)
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern!r} is neither a layer name nor a regular expression: {error}") from None
    ending = f".{pattern}"

    def matches(name: str) -> bool:
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
        return name == pattern or name.endswith(ending) or any(expression.fullmatch(name, start) for start in starts)

    return matches


def is_plain_name(pattern: str) -> bool:
    """Return whether ``pattern`` consists only of characters that occur in module names."""
    return _NAME.fullmatch(pattern) is not None


def are_short(patterns: Iterable[str]) -> bool:
    """Return whether the regular expressions in ``patterns`` have at most :data:`MOST_CHARACTERS` characters in all."""
    return sum(len(pattern) for pattern in patterns if not is_plain_name(pattern)) <= MOST_CHARACTERS
