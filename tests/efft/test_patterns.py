"""Test patterns of layer names.

Python's ``re`` matches the patterns of users. Patterns in a file are not trusted, because ``re`` may need unlimited
time for them. They are matched in bounded time or rejected.
"""

from __future__ import annotations

import re
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

import efft
from efft.integrations.file_patterns import file_matchers
from efft.planning.names import MOST_CHARACTERS, are_short, matcher
from tests.hostile import within


def by_re(pattern: str, name: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}") or bool(re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name))


NAMES = st.text("ab.1", min_size=1, max_size=12)
CHARACTERS = st.sampled_from(["a", "b", "1", ".", r"\.", r"\d", r"\w", "[ab]", "[^a.]", "[]a]", "[a-b1]", r"[\d.]"])


def larger(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.lists(parts, max_size=4).map("".join),
        st.lists(parts, min_size=2, max_size=3).map(lambda each: f"({'|'.join(each)})"),
        st.tuples(parts, st.sampled_from(["*", "+", "?", "*?", "+?", "??"])).map(lambda p: f"(?:{p[0]}){p[1]}"),
        st.tuples(CHARACTERS, st.sampled_from(["*", "+", "?"])).map("".join),
    )


EDGES = st.tuples(st.sampled_from(["", "^"]), st.recursive(CHARACTERS, larger), st.sampled_from(["", "$"]))


@given(pattern=EDGES.map("".join), names=st.lists(NAMES, min_size=1, max_size=8))
def test_as_re_matches(pattern: str, names: list[str]) -> None:
    expected = [by_re(pattern, name) for name in names]
    assert list(map(matcher(pattern), names)) == expected
    try:
        (matches,) = file_matchers([pattern])
    except ValueError:
        return
    assert list(map(matches, names)) == expected


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("attn.qkv", "blocks.0.attn.qkv", True),
        ("kv", "blocks.0.attn.qkv", False),
        ("q.v", "attn.qkv", True),
        (r"^attn\.qkv$", "attn.qkv", True),
        (r"^attn\.qkv$", "blocks.attn.qkv", False),
        (r"^a|b", "x.b", True),
        (r"^a|b", "x.a", False),
        (r"(\w+\.)*fc[12]", "a.b.fc2", True),
        ("a(b", "x.a(b", ValueError),
    ],
)
def test_examples(pattern: str, name: str, expected: bool | type[Exception]) -> None:
    if isinstance(expected, bool):
        assert matcher(pattern)(name) == expected == by_re(pattern, name)
    else:
        with pytest.raises(expected, match="neither a layer name nor a regular expression"):
            matcher(pattern)


@pytest.mark.parametrize(
    "pattern", ["(?=a)a", "(?P<n>a)", "a{2}", r"\bab*", r"(a)\1", "(?i)a", r"\Aa+", "(" * 500 + "a" + ")" * 500]
)
def test_other_expressions_are_refused(pattern: str) -> None:
    """These patterns are rejected only in files. Users may write every pattern that ``re`` accepts."""
    with pytest.raises(ValueError, match="neither a layer name nor a regular expression"):
        file_matchers([pattern])


@pytest.mark.parametrize(
    "pattern",
    [
        "(((((.+)+)+)+)+)+!",
        "(.|.)*" * 30 + "!",
        "(.?)" * 60 + "!",
        ".*" * (MOST_CHARACTERS // 2),
        "(a|" * 200 + ")" * 200 + "*!",
        "[" * 2000 + "]*",
        ".*(" + "|".join(["."] * 40) + ").*!",
        "(.|.|.|.)" * 8 + "!",
        "|".join([".*!"] * 2),
        ".?" * 40 + "!",
    ],
)
def test_expressions_that_drag(pattern: str) -> None:
    """In a file, these patterns are rejected at once or matched in bounded time."""
    with within(5), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # re warns about nested sets
        try:
            (matches,) = file_matchers([pattern])
        except ValueError as error:
            assert "names of the layers" in str(error)  # noqa: PT017
            return
        for i in range(24):
            assert not matches(f"encoder.layers.{i}.self_attention.attention.output.dense")


def test_expressions_of_a_file_are_counted_together() -> None:
    assert len(file_matchers([r"layers\.\d+\..*(q|v)_proj"] * 15)) == 15
    with pytest.raises(ValueError, match="too many alternatives and repeated characters together"):
        file_matchers([r"layers\.\d+\..*(q|v)_proj"] * 50)


@pytest.mark.parametrize("pattern", ["(?=a)a", "(?P<n>a)", "a{1}", r"\ba", r"(a)\1?", "(?i)A", r"(?<!b\.)a$"])
def test_users_may_write_every_expression(pattern: str) -> None:
    assert matcher(pattern)("x.a")
    assert matcher(pattern)("a")
    assert not matcher(pattern)("b")


def test_long_lists_of_expressions_are_refused() -> None:
    assert are_short(["blocks.0.attn.qkv"] * 10_000)
    assert are_short(["a*" * (MOST_CHARACTERS // 2)])
    assert not are_short(["a*" * (MOST_CHARACTERS // 4 + 1)] * 2)
    for field in ("targets", "exclude"):
        with pytest.raises(ValueError, match=f"{field} must be of at most 2000 characters of regular expressions, got"):
            efft.EfftConfig(**{field: ["a*"] * MOST_CHARACTERS})
