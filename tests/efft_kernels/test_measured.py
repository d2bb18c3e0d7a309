"""Test the choice of ``auto`` between the library's kernels and the vendor's products by a table of measurements.

A *case* is an op with its sizes, its dtype and the compute capability of the GPU. A *row* of the table holds the
measured time of each backend for one case.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from efft_kernels import Backend, autotune, backends, measured
from efft_kernels.measured import Case, Row, fastest, nearest

CASE = Case("tt_linear", 12608, 768, 2304, 32, "bfloat16", 9)
CPU = torch.device("cpu")
COMMITTED = measured.COMMITTED


def row(case: Case, triton: float, eager: float = 100.0, **others: float) -> Row:
    return Row(case, {"eager": eager, "triton": triton, **others}, "measured on paper")


def prefers_triton(case: Case, device: torch.device) -> bool:
    return fastest(case, device, ["eager", "triton"]) == "triton"


@pytest.fixture(autouse=True)
def _nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the committed table, which only one test needs."""
    monkeypatch.setattr(measured, "_rows", [])
    monkeypatch.setattr(measured, "_measurer", None)


def use_table(monkeypatch: pytest.MonkeyPatch, path: Path, *rows: Row) -> None:
    monkeypatch.setattr(measured, "_rows", [])
    measured.write(path, rows)
    autotune.use_table(path)


def test_the_committed_table_names_where_each_row_comes_from() -> None:
    assert measured.read(COMMITTED)
    for found in measured.read(COMMITTED):
        assert found.origin.startswith("measured on NVIDIA ")
        assert {"eager"} < found.microseconds.keys() <= {"eager", "triton", "cuda"}


@pytest.mark.parametrize(
    ("change", "speaks"),
    [
        ({}, True),
        ({"tokens": 6400}, True),
        ({"tokens": 25000}, True),
        ({"tokens": 6000}, False),
        ({"tokens": 0}, False),
        ({"r1": 17}, True),
        ({"r1": 33}, False),
        ({"d_in": 1024}, False),
        ({"r1": 1}, True),
        ({"dtype": "float16"}, True),
        ({"dtype": "float32"}, False),
        ({"capability": 8}, False),
        ({"op": "tt_gelu_linear"}, False),
    ],
)
def test_what_a_row_speaks_for(change: dict[str, object], speaks: bool) -> None:
    assert (nearest(replace(CASE, **change), [row(CASE, 50)], widths=1.0) is not None) == speaks


@pytest.mark.parametrize(
    ("change", "speaks"),
    [
        ({"d_in": 384, "d_out": 4608}, True),
        ({"d_in": 376}, False),
        ({"d_out": 4616}, False),
        ({"d_in": 770}, False),
        ({"d_in": 1024, "tokens": 6000}, False),
    ],
)
def test_where_no_row_is_of_this_layer(
    change: dict[str, object], speaks: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """If no row has the layer's d_in and d_out, rows with similar widths decide, unless the case can be measured."""
    case = replace(CASE, **change)
    assert (nearest(case, [row(CASE, 50)], widths=2.0) is not None) == speaks
    use_table(monkeypatch, tmp_path / "own.json", row(CASE, 50))
    with mock.patch.object(autotune.Autotuner, "can_measure", return_value=False):
        assert prefers_triton(case, CPU) == speaks
    with mock.patch.object(autotune, "measure", return_value=row(case, 150)) as measure:
        assert not prefers_triton(case, CPU)
    assert measure.call_count == 1


def test_a_plain_layer_speaks_for_one_behind_a_producer_that_nobody_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gelu = replace(CASE, op="tt_gelu_linear")
    use_table(monkeypatch, tmp_path / "own.json", row(CASE, 50))
    with mock.patch.object(autotune.Autotuner, "can_measure", return_value=False):
        assert prefers_triton(gelu, CPU)
    use_table(monkeypatch, tmp_path / "own.json", row(CASE, 50), row(gelu, 150))
    assert not prefers_triton(gelu, CPU)


def test_the_most_alike_counts() -> None:
    rows = [row(replace(CASE, d_in=1536), 1), row(replace(CASE, d_in=1000), 2), row(replace(CASE, d_out=1152), 3)]
    found = nearest(replace(CASE, d_in=896), rows, widths=2.0)
    assert found is rows[1]


def test_the_nearest_row_counts_and_the_users_come_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    half = replace(CASE, tokens=6304)
    own = [row(CASE, 120), row(half, 50), row(CASE, 10)]
    use_table(monkeypatch, tmp_path / "own.json", *own)
    assert not prefers_triton(CASE, CPU), "of equal rows the first counts"
    assert prefers_triton(replace(CASE, tokens=7000), CPU)


def test_the_fastest_of_those_that_can_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_table(monkeypatch, tmp_path / "own.json", row(CASE, 50, cuda=40), row(replace(CASE, d_in=3072), 50))
    assert fastest(CASE, CPU, ["eager", "triton", "cuda"]) == "cuda"
    assert fastest(CASE, CPU, ["eager", "triton"]) == "triton"
    assert fastest(replace(CASE, d_in=3072), CPU, ["eager", "cuda"]) == "eager", (
        "the row of this case has no time of cuda"
    )
    assert fastest(replace(CASE, d_in=3072), CPU, ["cuda"]) is None


def test_unmeasured_and_not_asked_to_measure() -> None:
    with mock.patch.object(autotune, "measure", side_effect=AssertionError):
        assert not prefers_triton(replace(CASE, d_in=17), CPU)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_compiled_code_asks_too(dynamic: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "_rows", [row(CASE, 50), row(replace(CASE, tokens=1000), 120)])

    def ask(x: torch.Tensor) -> torch.Tensor:
        name = fastest(Case("tt_linear", x.shape[0], 768, 2304, 32, "bfloat16", 9), x.device, ["eager", "triton"])
        return x + {None: 0, "eager": 1, "triton": 2}[name]

    torch._dynamo.reset()
    compiled = torch.compile(ask, backend="eager", fullgraph=True, dynamic=dynamic)
    for tokens in (12608, 13000, 1000, 1100, 100):
        assert compiled(torch.zeros(tokens))[0] == ask(torch.zeros(tokens))[0]


@pytest.mark.parametrize("text", ["", "{", "[1]", '[{"case": {"op": "tt_linear"}, "microseconds": {}, "origin": ""}]'])
def test_a_damaged_table(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"table.json is not a table of measurements .*: delete it, or name another"):
        measured.read(path)


def test_auto_on_a_gpu_follows_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_table(monkeypatch, tmp_path / "table.json", row(CASE, 50), row(replace(CASE, d_in=3072), 150))
    W = mock.Mock(spec=Tensor, device=torch.device("cuda"), dtype=torch.bfloat16)
    with (
        mock.patch.object(backends, "can_run", side_effect=lambda b, *_: "no" if b is Backend.CPU else None),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(autotune.Autotuner, "can_measure", return_value=False),
    ):
        chosen = [backends.resolve("tt_linear", "auto", W, sizes=(12608, d_in, 2304, 32)) for d_in in (768, 3072, 128)]
        assert chosen[1:] == [Backend.EAGER, Backend.EAGER]
        assert chosen[0] is Backend.TRITON
    with (
        mock.patch.object(backends, "can_run", side_effect=lambda b, *_: None if b is Backend.EAGER else "no"),
        mock.patch.object(backends, "is_final", return_value=False),
        mock.patch.object(backends, "fastest", side_effect=AssertionError),
    ):
        assert backends.resolve("tt_linear", "auto", W, sizes=(12608, 768, 2304, 32)) is Backend.EAGER


@pytest.mark.parametrize("settled", [True, False])
def test_the_table_is_asked_once(settled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is not cached if a later call is allowed to measure but the current one is not."""
    monkeypatch.setattr(backends, "_answers", {})
    W = mock.Mock(spec=Tensor, device=torch.device("cuda"), dtype=torch.bfloat16)
    with (
        mock.patch.object(backends, "can_run", return_value=None),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(backends, "is_final", return_value=settled),
        mock.patch.object(backends, "fastest", side_effect=["cuda", "triton", "eager"]) as fastest,
    ):
        answers = [backends.resolve("tt_linear", "auto", W, sizes=(12608, 768, 2304, 32)) for _ in range(2)]
        assert answers == [Backend.CUDA, Backend.CUDA if settled else Backend.TRITON]
        assert backends.resolve("tt_linear", "auto", W, sizes=(1, 768, 2304, 32)) is not answers[-1]
        assert fastest.call_count == (2 if settled else 3)
        monkeypatch.setattr(backends, "_MOST_ANSWERS", 2)
        fastest.side_effect = ["eager"] * 4
        for tokens in range(2, 6):
            backends.resolve("tt_linear", "auto", W, sizes=(tokens, 768, 2304, 32))
    assert len(backends._answers) <= 2


def test_a_row_speaks_for_its_generation_of_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The field ``kernels`` of a row is the generation of the CUDA kernels that were measured.
    first, second = row(CASE, 150, cuda=90), replace(row(CASE, 150, cuda=110), kernels=2)
    use_table(monkeypatch, tmp_path / "measured.json", second, first)
    assert measured.read(tmp_path / "measured.json") == (second, first)
    rivals = ["eager", "triton", "cuda"]
    assert fastest(CASE, CPU, rivals) == "cuda"
    monkeypatch.setattr(measured, "KERNELS", 2)
    assert fastest(CASE, CPU, rivals) == "eager"
    monkeypatch.setattr(measured, "_rows", [first])  # the table has no row for the second generation
    assert fastest(CASE, CPU, rivals) == "cuda"


@pytest.mark.parametrize("kernels", [0, 1.5, "2", True])
def test_an_impossible_generation_is_refused(tmp_path: Path, kernels: object) -> None:
    (tmp_path / "table.json").write_text(json.dumps([{**asdict(row(CASE, 50)), "kernels": kernels}]))
    with pytest.raises(ValueError, match="kernels has a value of the wrong type or size"):
        measured.read(tmp_path / "table.json")
