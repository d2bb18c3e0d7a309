"""Check a sample of docs/models.md, which lists the adapted layers of every architecture of timm and transformers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.models import architectures, examine

pytestmark = pytest.mark.slow  # creates models of many architectures

PAGE = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
#: The tests check only every n-th architecture; ``python -m benchmarks models`` examines all of them in minutes.
EVERY = {"timm": 60, "transformers": 60}


def section(library: str, title: str) -> dict[str, list[str]]:
    """Return the rows of a table on the page, keyed by their first cell."""
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
    """At least 95 % (timm) and 90 % (transformers) of the architectures that can be created are adapted completely."""
    for library, least in (("timm", 95), ("transformers", 90)):
        (row,) = re.findall(rf"^\| {library} \| .*$", PAGE, re.MULTILINE)
        share = float(re.findall(r"\(([\d.]+)%\)", row)[0])
        assert share >= least, row
