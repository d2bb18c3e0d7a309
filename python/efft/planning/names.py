"""The names of layers and weights that a user selects: whole names, endings, or regular expressions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

#: What the regular expressions of a list may have together. More than this is a mistake, or a damaged file.
MOST_CHARACTERS = 2000

_NAME = re.compile(r"[\w.-]*")


def matcher(pattern: str) -> Callable[[str], bool]:
    """Return a function that tells whether ``pattern`` selects a name.

    A pattern selects a name that it equals, a name that ends with it after a dot, and a name of which it matches the
    whole, or everything after a dot, as a regular expression. Python's :mod:`re` can need exponential time for an
    expression that was made for that purpose, so this is for patterns that the user types. Adapter files are loaded by
    the exact names that they record.

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
    """Return whether ``pattern`` has only characters that module names consist of."""
    return _NAME.fullmatch(pattern) is not None


def are_short(patterns: Iterable[str]) -> bool:
    """Return whether the regular expressions among ``patterns`` have at most :data:`MOST_CHARACTERS` together."""
    return sum(len(pattern) for pattern in patterns if not is_plain_name(pattern)) <= MOST_CHARACTERS
