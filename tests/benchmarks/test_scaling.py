"""Test the exponents that the scaling benchmark fits to times, and its table.

A row is one implementation of an adapted layer. The row "floor" is the frozen baseline.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import scaling
from benchmarks.ops import rows
from benchmarks.ops.cases import Case
from benchmarks.ops.run import Setting

CASE = Case("qkv", "vit_b", images=8, rank=32, dtype="float32")
WANTED = rows.select(["naive"])


def measurement(seconds: dict[str, float], case: Case) -> list[dict[str, Any]]:
    about = {"model": case.model, "case": case.case, "dtype": case.dtype, "rank": case.rank}
    about |= {"tokens": case.sizes.tokens, "device": "cpu", "l2": None, "cuda_graphs": False, "reason": None}
    return [{**about, "row": row, "seconds": {"fwd_bwd": {"p50": t}}} for row, t in seconds.items()]


def test_exponent_of_a_power_law() -> None:
    assert scaling.exponent([1, 2, 4, 8], [3.0, 12.0, 48.0, 192.0]) == pytest.approx(2)
    assert scaling.exponent([1, 2], [5.0, 5.0]) == pytest.approx(0)
    assert scaling.exponent([1, 2], [5.0, -0.1]) is None
    assert scaling.exponent([1], [5.0]) is None


def test_a_sweep_fits_the_whole_time_and_what_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark fits two exponents: one to a row's total time, one to the time that the row adds to the baseline.

    In this test, the time of the baseline is proportional to the tokens. The row "naive" adds a small time that is
    proportional to tokens times rank.
    """

    def measure(case: Case, wanted: object, setting: object) -> list[dict[str, Any]]:
        floor = 1e-3 * case.images
        return measurement({"floor": floor, "naive": floor + 1e-6 * case.images * case.rank}, case)

    monkeypatch.setattr(scaling, "measure", measure)
    lines = scaling.sweep("tokens", [1, 2, 4], CASE, WANTED, Setting())
    fits = {line["row"]: line for line in lines if "exponent" in line}
    assert fits["naive"]["sizes"] == [197, 394, 788]
    assert fits["naive"]["exponent"] == pytest.approx(1)
    assert fits["floor"]["exponent_added"] is None
    assert {line["sweep"] for line in lines} == {"tokens"}

    lines = scaling.sweep("rank", [8, 16, 64], CASE, WANTED, Setting())
    fits = {line["row"]: line for line in lines if "exponent" in line}
    assert fits["floor"]["exponent"] == pytest.approx(0)
    assert fits["naive"]["exponent_added"] == pytest.approx(1)
    assert 0 < fits["naive"]["exponent"] < 0.1
    shown = scaling.table(lines).splitlines()
    assert shown[0].split() == ["rank", "8", "16", "64", "exponent", "of", "added"]
    assert shown[2].split() == ["naive", "8.064", "8.128", "8.512", "0.03", "1.00"]


def test_a_row_without_all_its_times_gets_no_exponent(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(case: Case, wanted: object, setting: object) -> list[dict[str, Any]]:
        floor, naive = measurement({"floor": 1.0, "naive": 2.0}, case)
        if case.rank == 16:
            naive = {**naive, "reason": "wrong"}
            del naive["seconds"]
        return [floor, naive]

    monkeypatch.setattr(scaling, "measure", measure)
    lines = scaling.sweep("rank", [8, 16], CASE, WANTED, Setting())
    assert {line["row"] for line in lines if "exponent" in line} == {"floor"}
    assert scaling.table(lines).splitlines()[-1] == "naive            -- wrong"
