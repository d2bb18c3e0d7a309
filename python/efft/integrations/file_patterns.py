"""Match layer names with patterns from untrusted files.

Python's :mod:`re` can need exponential time for a malicious expression, and a downloaded checkpoint must not be able to
block the program. Only expressions with few ways to match are therefore accepted.
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
#: Maximum number of repeated characters in one expression. Each of them multiplies the time by the length of a name.
_MOST_REPEATED = 2
#: Number of ways to match that one repeated character counts as.
_WAYS_OF_REPEATED = 50
#: Maximum number of ways to match, summed over the expressions in one file.
_MOST_WAYS = 100_000


def file_matchers(patterns: Iterable[str]) -> list[Callable[[str], bool]]:
    """Return one matcher (:func:`efft.planning.names.matcher`) for each pattern from a file.

    Raises:
        ValueError: a pattern is neither a name nor a simple expression, or there are too many expressions.
    """
    patterns = list(patterns)
    total = sum(map(_ways, patterns))
    if total > _MOST_WAYS:
        raise ValueError(
            f"the {len(patterns)} patterns in the file (the first is {patterns[0][:50]!r}) have too many alternatives "
            "and repeated characters together: replace them by the names of the layers"
        )
    return [matcher(pattern) for pattern in patterns]


def _ways(pattern: str) -> int:
    """Return the approximate number of ways to match a name, which bounds the time for matching."""
    if is_plain_name(pattern):
        return 1
    repeated = len(re.findall(r"[*+]", pattern))
    if not _ACCEPTED.fullmatch(pattern) or repeated > _MOST_REPEATED:
        raise ValueError(
            f"{pattern[:80]!r} is neither a layer name nor a regular expression of the kind that is accepted from a "
            r"file: characters, '.', '\d', '\w', classes such as '[qv]', alternatives '(a|b)' that are neither nested "
            f"nor repeated, '^', '$', and at most {_MOST_REPEATED} characters that are repeated by '*' or '+'; replace "
            "it by the names of the layers"
        )
    groups = re.findall(r"\([^)]*\)", pattern)
    outside = re.sub(r"\([^)]*\)", "", pattern)
    return math.prod(part.count("|") + 1 for part in (outside, *groups)) * _WAYS_OF_REPEATED**repeated
