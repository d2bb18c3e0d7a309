"""Patterns of layer names, which a stranger's file may have: each character of a name costs a bounded time.

Python's ``re`` tries one way through a pattern after the other, and there can be more of them than there is time for.
Here all are followed at once: an expression becomes its characters, and which of them may follow which (Glushkov's
automaton).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

#: What the regular expressions of a list may have together; the time to match them grows with it.
MOST_CHARACTERS = 2000

_NAME = re.compile(r"[\w.-]*")
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?:|.", re.DOTALL)
_NO_CHARACTER = re.compile(r"[*+?{]|\\[\dAbBZz]")
#: Around a name, for ^ and $.
_START, _END = "\x02", "\x03"

_Part = tuple[bool, int, int]  # whether it matches nothing at all, too; its first and its last positions, as bits


def matcher(pattern: str) -> Callable[[str], bool]:
    """What tells whether ``pattern`` is a name or its last components, as they are or as a regular expression.

    An expression may have characters, classes, ``.``, ``|``, ``*``, ``+``, ``?``, brackets, ``^`` and ``$``.

    Raises:
        ValueError: it is something else.
    """
    try:
        re.compile(pattern)  # what Python does not understand is refused in its words
        # A name leaves no choice.
        expression: Callable[[str], object] = (
            re.compile(rf"(?:.*\.)?{pattern}").fullmatch if _NAME.fullmatch(pattern) else _Automaton(pattern)
        )
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern!r} is neither a layer name nor a regular expression: {error}") from None
    ending = f".{pattern}"
    return lambda name: name == pattern or name.endswith(ending) or bool(expression(name))


def are_short(patterns: Iterable[str]) -> bool:
    """Whether the regular expressions among ``patterns`` have no more than :data:`MOST_CHARACTERS`."""
    return sum(len(pattern) for pattern in patterns if not _NAME.fullmatch(pattern)) <= MOST_CHARACTERS


class _Automaton:
    """Called with a name: whether the expression, which Python understands, matches it or its last components."""

    def __init__(self, expression: str) -> None:
        self._tokens, self._at = _TOKEN.findall(rf"(?:^.*\.|^)?(?:{expression})$?"), 0
        self._characters: list[re.Pattern[str]] = []  # by position
        self._next: list[int] = []  # by position: those that may follow it, as bits
        self._positions: dict[str, int] = {}  # by character: those that it fits, as bits
        _, self._first, self._last = self._choice()

    def __call__(self, name: str) -> bool:
        here, following = 0, self._first
        for character in f"{_START}{name}{_END}":
            here = following & self._fitting(character)
            following = 0
            for position in _bits(here):
                following |= self._next[position]
        return bool(here & self._last)

    def _fitting(self, character: str) -> int:
        if character not in self._positions:
            fits = [i for i, pattern in enumerate(self._characters) if pattern.fullmatch(character)]
            self._positions[character] = sum(1 << i for i in fits)
        return self._positions[character]

    def _choice(self) -> _Part:
        empty, first, last = self._sequence()
        while self._take("|"):
            other = self._sequence()
            empty, first, last = empty or other[0], first | other[1], last | other[2]
        return empty, first, last

    def _sequence(self) -> _Part:
        empty, first, last = True, 0, 0
        while self._at < len(self._tokens) and self._tokens[self._at] not in ("|", ")"):
            part = self._repeated()
            self._connect(last, part[1])
            first, last = first | part[1] * empty, part[2] | last * part[0]
            empty = empty and part[0]
        return empty, first, last

    def _repeated(self) -> _Part:
        empty, first, last = self._single()
        sign = self._take("*", "+", "?")
        if sign in ("*", "+"):
            self._connect(last, first)
        if sign:
            self._take("?")  # which way is tried first does not matter
        return empty or sign in ("*", "?"), first, last

    def _single(self) -> _Part:
        token = self._tokens[self._at]
        self._at += 1
        if token in ("(", "(?:"):
            part = self._choice()
            self._at += 1  # the closing bracket
            return part
        if _NO_CHARACTER.fullmatch(token):
            raise ValueError(f"of the signs for more than a character only | * + ? and (...) can be used, not {token}")
        edges = {"^": _START, "$": _END}
        self._characters.append(re.compile(edges.get(token, f"(?![{_START}{_END}]){token}")))
        self._next.append(0)
        bit = 1 << len(self._next) - 1
        return False, bit, bit

    def _connect(self, last: int, first: int) -> None:
        for position in _bits(last):
            self._next[position] |= first

    def _take(self, *tokens: str) -> str | None:
        token = self._tokens[self._at] if self._at < len(self._tokens) else None
        if token not in tokens:
            return None
        self._at += 1
        return token


def _bits(mask: int) -> Iterable[int]:
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest
