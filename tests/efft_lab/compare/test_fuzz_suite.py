"""Test that randomly changed suites and result files are either accepted or rejected with a documented error."""

from __future__ import annotations

import json
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efft_lab.compare import store
from efft_lab.compare import suite as suites
from efft_lab.compare.agenda import Agenda
from tests.hostile import altered, at_most, damaged, fuzz

pytestmark = pytest.mark.slow  # runs hundreds of generated examples

LOCAL = json.loads((files("efft_lab.compare") / "suites" / "local.json").read_text("utf-8"))


def planned_or_refused(path: Path, quick: bool) -> None:
    with at_most(100), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            agenda = Agenda(suites.load(path, quick=quick))
        except (ValueError, FileNotFoundError) as error:
            assert str(error)  # noqa: PT017
        else:
            assert len({run.key for run in agenda.ready({})}) == len(agenda.ready({}))
            assert all(str(run) for run in agenda.ready({}))


@fuzz
@given(data=st.data(), quick=st.booleans())
def test_values(data: st.DataObject, quick: bool, tiny: dict[str, Any], tmp_path: Path) -> None:
    whole = data.draw(st.sampled_from([tiny, {**LOCAL, "name": "local"}]))
    (tmp_path / "suite.json").write_text(json.dumps(data.draw(altered(whole))))
    planned_or_refused(tmp_path / "suite.json", quick)


@fuzz
@given(data=st.data(), quick=st.booleans())
def test_bytes(data: st.DataObject, quick: bool, tmp_path: Path) -> None:
    (tmp_path / "suite.json").write_bytes(data.draw(damaged(json.dumps(LOCAL).encode())))
    planned_or_refused(tmp_path / "suite.json", quick)


@fuzz
@given(data=st.data())
def test_result_files(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(data.draw(damaged(b"".join(b'{"key": "%d", "test_accuracy": 0.5}\n' % i for i in range(5)))))
    try:
        records = store.read(path)
    except ValueError as error:
        assert f"{path}, line " in str(error)  # noqa: PT017
    else:
        assert all(isinstance(record, dict) for record in records.values())
