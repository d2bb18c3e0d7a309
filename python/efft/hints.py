"""Suggest names that a user may have meant, for error messages about unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

#: Only this many characters of a name are compared, because a name in a damaged file can be several megabytes long.
_LONGEST = 100

#: Maximum number of known names that a hint lists.
_MOST_LISTED = 30


def nearest(name: object, known: Iterable[str], n: int = 3) -> list[str]:
    """Return at most ``n`` of the ``known`` names that resemble ``name``, the most similar first."""
    return difflib.get_close_matches(str(name)[:_LONGEST], known, n, cutoff=0.5)


def did_you_mean(name: object, known: Collection[str], n: int = 1) -> str:
    """Return ``did you mean 'a' or 'b'?`` for at most ``n`` similar names, or else ``known: a, b, c``.

    The text completes an error message, after a semicolon or a colon.
    """
    near = nearest(name, known, n)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    names = list(known)
    more = f", ... ({len(names)} in all)" if len(names) > _MOST_LISTED else ""
    return f"known: {', '.join(names[:_MOST_LISTED]) or 'none'}{more}"
