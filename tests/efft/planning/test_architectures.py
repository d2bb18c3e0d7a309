"""docs/models.md says what is adapted in every architecture of timm and transformers; a sample of it is checked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.models import architectures, examine

pytestmark = pytest.mark.slow  # makes a model of many architectures

PAGE = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
#: Only every n-th architecture is checked; all of them take minutes (``python -m benchmarks models``).
EVERY = {"timm": 60, "transformers": 60}


def section(library: str, title: str) -> dict[str, list[str]]:
    """Return the rows of a table of the page, by their first cell."""
    match = re.search(rf"## {library}: {title}\n(.*?)(?=\n## |\Z)", PAGE, re.DOTALL)
    rows = [line.strip("|").split(" | ") for line in match[1].splitlines() if line.startswith("| ")] if match else []
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows[1:]}


@pytest.mark.parametrize("library", EVERY)
def test_a_sample_of_the_page(library: str) -> None:
    pytest.importorskip(library)
    wholly, rest = section(library, "wholly"), section(library, "in part or refused")
    assert len(wholly) > 20 * len(rest)
    known = [name for name in architectures(library) if name in wholly]
    assert len(known) > 0.9 * len(wholly), "the installed version lacks many of the page's architectures"
    for name in known[:: EVERY[library]]:
        outcome = examine(library, name)
        assert outcome.verdict == "wholly", outcome
        assert f"{outcome.parameters:,}" == wholly[name][0].removesuffix(" |"), name


def test_goals() -> None:
    """At least 95 % of timm's architectures and 90 % of transformers' that can be created are adapted wholly."""
    for library, least in (("timm", 95), ("transformers", 90)):
        (row,) = re.findall(rf"^\| {library} \| .*$", PAGE, re.MULTILINE)
        share = float(re.findall(r"\(([\d.]+)%\)", row)[0])
        assert share >= least, row
