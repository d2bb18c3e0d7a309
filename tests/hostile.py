"""Generate invalid inputs for readers of files, and limit the memory and the time that the readers use.

The inputs are files with randomly changed bytes, and JSON with unexpected values.
"""

from __future__ import annotations

import contextlib
import copy
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

#: Settings for fuzzers. All examples of a test share the fixtures, so each example must write its files again.
fuzz = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

#: The values that may replace any value in a JSON file.
_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 3, 10**9, 10**30, -(10**400)),
    *(0.5, -1e308, float("nan"), float("inf")),
    *("", "x" * 10_000, "../../../etc/passwd", "/dev/zero", "\0", "efft", "qkv", "(", "é", "1"),
    *([], [None], [[[]]], [3, 4], ["head", "head"], ["\0"], list(range(1000))),
    *({}, {"": {}}, {"mhsa": 3}, {"__class__": "os"}, {str(i): i for i in range(1000)}),
]
values = st.sampled_from(_VALUES).map(copy.deepcopy)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Return ``content`` with up to four changes: flipped bits, and removed, repeated, moved or new parts."""
    for _ in range(draw(st.integers(1, 4))):
        size = len(content)
        at, end = sorted((draw(st.integers(0, size)), draw(st.integers(0, size))))
        part = content[at:end]
        kind = draw(st.sampled_from(["bit", "bytes", "cut", "end", "double", "move", "number"]))
        if kind == "bit" and size:
            at = min(at, size - 1)
            content = content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]
        elif kind == "bytes":
            content = content[:at] + draw(st.binary(max_size=20)) + content[at + draw(st.integers(0, 20)) :]
        elif kind == "cut":
            content = content[:at] + content[end:]
        elif kind == "end":
            content = content[:at]
        elif kind == "double":
            content = content[:end] + part[:10_000] + content[end:]
        elif kind == "move":
            content = part + content[:at] + content[end:]
        elif kind == "number":  # files store lengths in this format
            number = draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]))
            content = content[:at] + number.to_bytes(8, "little") + content[at + 8 :]
    return content


@st.composite
def altered(draw: st.DrawFn, value: Any) -> Any:
    """Return a JSON value in which up to three parts, at any depth, are replaced, removed or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        if not places:
            return draw(values)
        inside, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if kind == "replace":
            inside[key] = draw(values)
        elif kind == "remove":
            del inside[key]
        elif isinstance(inside, dict):
            inside[draw(st.text(max_size=5))] = draw(values)
        else:
            inside.append(draw(values))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of every value inside ``value``."""
    inner = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, each in inner:
        yield value, key
        yield from _places(each)


@contextlib.contextmanager
def at_most(megabytes: float) -> Iterator[None]:
    """Fail if the peak memory inside the block exceeds the memory before the block by this many megabytes or more."""
    _RESET.write_text("5")  # resets the peak
    before = _memory("VmRSS")
    yield
    more = _memory("VmHWM") - before
    assert more < megabytes, f"the peak is {more:.0f} MB above the start, expected less than {megabytes} MB"


def _memory(name: str) -> float:
    (line,) = [line for line in _STATUS.read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) / 1024


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail if the block takes longer than this many seconds. The timeout also interrupts Python's ``re``."""

    def late(*_: object) -> None:
        raise AssertionError(f"the block took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
