"""Change tables of measurements at random: a table must be usable or rejected with an error that names the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from efft_kernels import measured
from tests.hostile import altered, at_most, damaged, fuzz

ROWS = json.loads(measured.COMMITTED.read_text())[:3]
CASE = measured.Case("tt_linear", 12608, 768, 768, 32, "bfloat16", 9)


def used_or_refused(path: Path) -> None:
    with at_most(50):
        try:
            rows = measured.read(path)
        except ValueError as error:
            assert str(error).startswith(f"{path} is not a table of measurements (")  # noqa: PT017
        else:
            row = measured.nearest(CASE, rows, measured.NEAR)
            assert row is None or isinstance(next(iter(row.microseconds), ""), str)
            measured.write(path, rows)
            assert measured.read(path) == rows


@fuzz
@given(data=st.data())
def test_bytes(data: st.DataObject, tmp_path: Path) -> None:
    (tmp_path / "table.json").write_bytes(data.draw(damaged(json.dumps(ROWS).encode())))
    used_or_refused(tmp_path / "table.json")


@fuzz
@given(data=st.data())
def test_values(data: st.DataObject, tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text(json.dumps(data.draw(altered(ROWS))))
    used_or_refused(tmp_path / "table.json")


@pytest.mark.parametrize("text", ["[" * 100_000, "5", "null", '{"a": 1}', "[3]", "\x00"])
def test_what_is_no_table(text: str, tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(ValueError, match=r"table\.json is not a table of measurements .*: delete it, or name another"):
        measured.read(tmp_path / "table.json")


def test_a_table_of_a_terabyte(tmp_path: Path) -> None:
    with open(tmp_path / "table.json", "wb") as file:
        file.truncate(2**40)
    with at_most(20), pytest.raises(ValueError, match=r"it has more than 16777216 bytes"):
        measured.read(tmp_path / "table.json")


def test_the_case_is_measured() -> None:
    """This test ensures that the fuzzers request a case that the table contains."""
    assert measured.nearest(CASE, measured.read(measured.COMMITTED), measured.NEAR) is not None
    assert torch.bfloat16 is getattr(torch, CASE.dtype)
