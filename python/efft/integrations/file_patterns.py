"""Patterns of layer names that come from a file of somebody else.

Python's :mod:`re` can need exponential time for an expression that was made for that purpose, and a downloaded
checkpoint must not be able to stop the program. So only expressions with few ways to match are accepted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable

from efft.planning.names import is_plain_name, matcher

_CHARACTER = r"(?:[\w/-]|\.|\\[.dw-]|\[\^?[\w.-]+\])"
_PART = rf"(?:{_CHARACTER}[*+]?)*"
_SEQUENCE = rf"{_PART}(?:\((?:\?:)?{_PART}(?:\|{_PART})*\){_PART})*"
_ACCEPTED = re.compile(rf"\^?{_SEQUENCE}(?:\|{_SEQUENCE})*\$?")
#: Repeated characters that one expression may have: each multiplies the time by the length of a name.
_MOST_REPEATED = 2
#: A repeated character counts as this many ways to match.
_WAYS_OF_REPEATED = 50
#: The ways to match that the expressions of one file may have together.
_MOST_WAYS = 100_000


def file_matchers(patterns: Iterable[str]) -> list[Callable[[str], bool]]:
    """Return what :func:`efft.planning.names.matcher` does, for each of the patterns of a file.

    Raises:
        ValueError: a pattern that is not a name or a simple expression, or too many expressions.
    """
    patterns = list(patterns)
    total = sum(map(_ways, patterns))
    if total > _MOST_WAYS:
        raise ValueError(
            f"the {len(patterns)} patterns, {patterns[0][:50]!r} first, have too many alternatives and repeated "
            "characters together for patterns from a file: write the names of the layers"
        )
    return [matcher(pattern) for pattern in patterns]


def _ways(pattern: str) -> int:
    """Return how many ways there are to match a name, about, which bounds the time that it takes."""
    if is_plain_name(pattern):
        return 1
    repeated = len(re.findall(r"[*+]", pattern))
    if not _ACCEPTED.fullmatch(pattern) or repeated > _MOST_REPEATED:
        raise ValueError(
            f"{pattern[:80]!r} is neither a layer name nor a regular expression of the kind that is accepted from a "
            r"file: characters, '.', '\d', '\w', classes such as '[qv]', alternatives '(a|b)' that are neither nested "
            f"nor repeated, '^', '$', and at most {_MOST_REPEATED} characters that are repeated by '*' or '+'; write "
            "the names of the layers"
        )
    groups = re.findall(r"\([^)]*\)", pattern)
    outside = re.sub(r"\([^)]*\)", "", pattern)
    return math.prod(part.count("|") + 1 for part in (outside, *groups)) * _WAYS_OF_REPEATED**repeated
