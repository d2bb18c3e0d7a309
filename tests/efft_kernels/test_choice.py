"""Own kernels or vendor's products: what a table of measurements makes auto do."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from efft_kernels import Backend, backends, choice
from efft_kernels.choice import Case, Row, fastest, nearest

CASE = Case("tt_linear", 12608, 768, 2304, 32, "bfloat16", 9)
CPU = torch.device("cpu")
COMMITTED = choice.COMMITTED


def row(case: Case, triton: float, eager: float = 100.0, **others: float) -> Row:
    return Row(case, {"eager": eager, "triton": triton, **others}, "measured on paper")


def prefers_triton(case: Case, device: torch.device) -> bool:
    return fastest(case, device, ["eager", "triton"]) == "triton"


@pytest.fixture(autouse=True)
def _nothing_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The committed table is another's subject."""
    choice.write(tmp_path / "committed.json", ())
    monkeypatch.setattr(choice, "COMMITTED", tmp_path / "committed.json")
    monkeypatch.setattr(choice, "_rows", [])


def use_table(monkeypatch: pytest.MonkeyPatch, path: Path, *rows: Row) -> None:
    monkeypatch.setenv("EFFT_AUTOTUNE", str(path))
    choice.write(path, rows)
    monkeypatch.setattr(choice, "_rows", choice._read_all())


def test_the_committed_table_names_where_each_row_comes_from() -> None:
    assert choice.read(COMMITTED)
    for found in choice.read(COMMITTED):
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
    """Others near it speak; unless it is measured."""
    case = replace(CASE, **change)
    assert (nearest(case, [row(CASE, 50)], widths=2.0) is not None) == speaks
    use_table(monkeypatch, tmp_path / "own.json", row(CASE, 50))
    with mock.patch.object(choice, "_can_measure", return_value=False):
        assert prefers_triton(case, CPU) == speaks
    with mock.patch.object(choice, "measure", return_value=row(case, 150)) as measure:
        assert not prefers_triton(case, CPU)
    assert measure.call_count == 1


def test_a_plain_layer_speaks_for_one_behind_a_producer_that_nobody_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gelu = replace(CASE, op="tt_gelu_linear")
    use_table(monkeypatch, tmp_path / "own.json", row(CASE, 50))
    with mock.patch.object(choice, "_can_measure", return_value=False):
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
    assert not prefers_triton(CASE, CPU), "the first of equals"
    assert prefers_triton(replace(CASE, tokens=7000), CPU)


def test_the_fastest_of_those_that_can_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_table(monkeypatch, tmp_path / "own.json", row(CASE, 50, cuda=40), row(replace(CASE, d_in=3072), 50))
    assert fastest(CASE, CPU, ["eager", "triton", "cuda"]) == "cuda"
    assert fastest(CASE, CPU, ["eager", "triton"]) == "triton"
    assert fastest(replace(CASE, d_in=3072), CPU, ["eager", "cuda"]) == "eager", "of an older row, without cuda"
    assert fastest(replace(CASE, d_in=3072), CPU, ["cuda"]) is None


def test_unmeasured_and_not_asked_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EFFT_AUTOTUNE", raising=False)
    with mock.patch.object(choice, "measure", side_effect=AssertionError):
        assert not prefers_triton(replace(CASE, d_in=17), CPU)


def test_measured_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = tmp_path / "new" / "table.json"
    monkeypatch.setenv("EFFT_AUTOTUNE", str(table))
    with mock.patch.object(choice, "measure", side_effect=lambda case, device, backends: row(case, 50)) as measure:
        assert prefers_triton(CASE, CPU)
        assert prefers_triton(CASE, CPU)
        assert prefers_triton(replace(CASE, d_in=3072), CPU)
    assert measure.call_count == 2
    assert [r.case.d_in for r in choice.read(table)] == [768, 3072]
    assert list(table.parent.iterdir()) == [table]
    monkeypatch.setattr(choice, "_rows", choice._read_all())
    with mock.patch.object(choice, "measure", side_effect=AssertionError):
        assert prefers_triton(CASE, CPU), "read again"


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_compiled_code_asks_too(dynamic: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EFFT_AUTOTUNE", raising=False)
    monkeypatch.setattr(choice, "_rows", [row(CASE, 50), row(replace(CASE, tokens=1000), 120)])

    def ask(x: torch.Tensor) -> torch.Tensor:
        name = fastest(Case("tt_linear", x.shape[0], 768, 2304, 32, "bfloat16", 9), x.device, ["eager", "triton"])
        return x + {None: 0, "eager": 1, "triton": 2}[name]

    torch._dynamo.reset()
    compiled = torch.compile(ask, backend="eager", fullgraph=True, dynamic=dynamic)
    for tokens in (12608, 13000, 1000, 1100, 100):
        assert compiled(torch.zeros(tokens))[0] == ask(torch.zeros(tokens))[0]


@pytest.mark.parametrize(
    ("module", "question"),
    [(torch.compiler, "is_compiling"), (torch, "are_deterministic_algorithms_enabled")],
    ids=["compiling", "deterministic"],
)
def test_when_nothing_is_measured(
    module: object, question: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EFFT_AUTOTUNE", str(tmp_path / "table.json"))
    with (
        mock.patch.object(choice, "measure", side_effect=AssertionError),
        mock.patch.object(module, question, return_value=True),
    ):
        assert not prefers_triton(CASE, CPU)


@pytest.mark.parametrize("text", ["", "{", "[1]", '[{"case": {"op": "tt_linear"}, "microseconds": {}, "origin": ""}]'])
def test_a_damaged_table(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"table.json is no table of measurements .*: delete it, or name another"):
        choice.read(path)


@pytest.mark.parametrize("op", choice.OPS)
def test_a_measurement(op: str) -> None:
    """Each is run as asked; here the place of the kernels for GPUs is taken by the specification."""
    case = Case(op, 7, 24, 40, 5, "float32", 9)
    ran: list[str] = []

    def resolve(op: str, backend: str, *tensors: Tensor, **_: object) -> Backend:
        ran.append(backend)
        return Backend.EAGER if backend == "eager" else Backend.REFERENCE

    with (
        mock.patch(f"efft_kernels.ops.{op}.resolve", resolve),
        mock.patch.object(choice, "_origin", return_value="here"),
    ):
        found = choice.measure(case, CPU, ["eager", "triton", "cuda"], repeats=3)
    assert ran == ["eager", "triton", "cuda"] * 5
    assert found.microseconds.keys() == {"eager", "triton", "cuda"}
    assert found.case == case
    assert all(0 < us < 1e6 for us in found.microseconds.values())
    json.dumps(found.microseconds)


@pytest.mark.parametrize(
    ("module", "version"), [(mock.Mock(__version__="3.6.0"), "3.6.0"), (None, "not installed")], ids=["with", "without"]
)
def test_a_measurement_needs_no_triton(module: object, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled kernels are measured where Triton is missing."""
    monkeypatch.setitem(sys.modules, "triton", module)
    assert choice._origin(CPU).startswith(f"measured on a CPU, torch {torch.__version__}, triton {version}, 20")


def test_auto_on_a_gpu_follows_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_table(monkeypatch, tmp_path / "table.json", row(CASE, 50), row(replace(CASE, d_in=3072), 150))
    W = mock.Mock(spec=Tensor, device=torch.device("cuda"), dtype=torch.bfloat16)
    with (
        mock.patch.object(backends, "can_run", side_effect=lambda b, *_: "no" if b is Backend.CPU else None),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(choice, "_can_measure", return_value=False),
    ):
        chosen = [backends.resolve("tt_linear", "auto", W, sizes=(12608, d_in, 2304, 32)) for d_in in (768, 3072, 128)]
        assert chosen[1:] == [Backend.EAGER, Backend.EAGER]
        assert chosen[0] is Backend.TRITON
    with (
        mock.patch.object(backends, "can_run", side_effect=lambda b, *_: None if b is Backend.EAGER else "no"),
        mock.patch.object(backends, "settled", return_value=False),
        mock.patch.object(backends, "fastest", side_effect=AssertionError),
    ):
        assert backends.resolve("tt_linear", "auto", W, sizes=(12608, 768, 2304, 32)) is Backend.EAGER


@pytest.mark.parametrize("settled", [True, False])
def test_the_table_is_asked_once(settled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """But where a later call may measure what this one may not."""
    monkeypatch.setattr(backends, "_answers", {})
    W = mock.Mock(spec=Tensor, device=torch.device("cuda"), dtype=torch.bfloat16)
    with (
        mock.patch.object(backends, "can_run", return_value=None),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(backends, "settled", return_value=settled),
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


def test_what_may_be_measured_later_is_not_settled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EFFT_AUTOTUNE", raising=False)
    with mock.patch.object(choice, "_can_measure", return_value=False):
        assert choice.settled(CPU)
        monkeypatch.setenv("EFFT_AUTOTUNE", str(tmp_path / "table.json"))
        assert not choice.settled(CPU)
    assert choice.settled(CPU)


def test_the_command_needs_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--out", str(tmp_path / "t.json"), *["--tokens", "7", "--d-in", "24", "--d-out", "40", "--rank", "5"]]
    case = row(replace(CASE, tokens=7), 50)
    with mock.patch.object(torch.cuda, "is_available", return_value=False), pytest.raises(SystemExit):
        choice.main(words)
    assert "there is no GPU to measure on" in capsys.readouterr().err
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(choice, "_able", return_value=["eager", "cuda"]),
        mock.patch.object(choice, "measure", return_value=case) as measure,
    ):
        assert choice.main([*words, "--op", "tt_linear", "tt_gelu_linear"]) == 0
    assert all(call.args[1:] == ("cuda", ["eager", "cuda"]) for call in measure.call_args_list)
    assert [call.args[0].op for call in measure.call_args_list] == ["tt_linear", "tt_gelu_linear"]
    assert choice.read(tmp_path / "t.json") == (case, case)
    assert "tt_gelu_linear 7 24 40 5 bfloat16 triton 50.0 us, eager 100.0 us" in capsys.readouterr().out
