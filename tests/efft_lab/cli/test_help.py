"""Test that the help texts are plain text, although they come from docstrings with markup."""

from __future__ import annotations

import contextlib
import re

import pytest

from efft_lab.cli import main

for package in ("timm", "tyro"):
    pytest.importorskip(package, reason="needs the dev extra")


@pytest.mark.parametrize(
    "words", ["train", "eval", "compare", "merge", "export", "inspect", "data", "data list", "data fetch", "env"]
)
def test_help_has_no_markup(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        main([*words.split(), "--help"])
    out = capsys.readouterr().out
    assert f"usage: efft {words}" in out
    assert not re.findall(r"``|:[a-z]+:`|~[a-z]+\.", out)


def test_help_wraps_paragraphs() -> None:
    from efft_lab.cli.parsing import without_markup

    text = "See :meth:`auto`; ``a`` or\n    :func:`~efft.apply`.\n\nAnother."
    assert without_markup(text) == "See `auto`; `a` or `efft.apply`.\n\nAnother."
