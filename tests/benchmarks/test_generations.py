"""Test the comparison of the generations of kernels, whose processes take turns, on the CPU."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import generations as compared
from benchmarks.__main__ import main
from benchmarks.generations import Generations, LayerTask, Measure, Packed, StepTask, lines_of, show_block
from benchmarks.model.step import Setting
from benchmarks.ops import cases
from benchmarks.ops.cases import Case
from benchmarks.ops.run import judge
from efft.graphs import capture
from efft_kernels import Backend, _packed
from efft_lab.record import read
from tests.efft.graphs.emulation import EmulatedGraphs


@dataclass(frozen=True)
class Turns:
    """A task that writes its generation to a file at each measurement. Its second generation can have a fault."""

    path: Path
    fault: str = ""
    to_prepare: float = 60.0

    def prepare(self) -> tuple[dict[compared.Key, str | None], Measure]:
        number = int(os.environ[compared.VARIABLE])
        if number == 2 and self.fault == "raises":
            raise RuntimeError("planted\nwith details")
        if self.fault == "never prepares":
            time.sleep(60)

        def measure() -> dict[compared.Key, float]:
            if number == 2 and self.fault == "crashes":
                os._exit(7)
            if number == 2 and self.fault == "hangs":
                time.sleep(60)
            with self.path.open("a") as file:
                file.write(f"{number}")
            return {("floor", "launched"): 2.0, ("row", "launched"): 2.0 + number}

        return {("floor", "launched"): None, ("row", "launched"): None, ("other", "launched"): "wrong: y"}, measure

    def about(self, variant: str) -> dict[str, Any]:
        return {"model": "none", "cuda_graphs": variant == "graph"}


@pytest.mark.slow
def test_generations_take_turns_and_each_reads_its_own_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(compared.VARIABLE, "1")
    task = Turns(tmp_path / "turns")
    with Generations([1, 3, 2]) as generations:
        lines = lines_of(task, generations.measure(task, repeats=3))
    assert task.path.read_text() == "132" * 3
    assert os.environ[compared.VARIABLE] == "1"
    assert [(x["generation"], x["row"]) for x in lines] == [
        (g, r) for g in (1, 3, 2) for r in ("floor", "row", "other")
    ]
    timed = [line for line in lines if line["row"] == "row"]
    assert [line["ratio"]["p50"] for line in timed] == [1.5, 2.5, 2.0]
    assert [line["seconds"]["n"] for line in timed] == [3, 3, 3]
    assert all(line["reason"] == "wrong: y" and "seconds" not in line for line in lines if line["row"] == "other")
    assert lines[0].keys() >= {"date", "machine", "versions", "commit", "command", "suite"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raises", "failed: RuntimeError: planted"),
        ("crashes", "failed: the process ended with exit code 7"),
        ("hangs", "failed: the process did not answer in time, so a kernel may never have ended"),
    ],
)
def test_a_generation_that_fails_does_not_stop_the_others(
    fault: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compared, "TO_MEASURE", 2.0)
    task, next_one = Turns(tmp_path / "turns", fault), Turns(tmp_path / "next")
    with Generations([1, 2]) as generations:
        lines = lines_of(task, generations.measure(task, repeats=2))
        after = lines_of(next_one, generations.measure(next_one, repeats=1))
    assert task.path.read_text() == "11"
    assert [line["row"] for line in lines] == ["floor", "row", "other", None]
    assert lines[-1]["generation"] == 2
    assert lines[-1]["reason"] == reason
    if fault == "hangs":
        assert next_one.path.read_text() == "1"
        assert after[-1]["reason"] == "not measured: the process did not answer in an earlier measurement"
    else:
        assert next_one.path.read_text() == "12", "the next task must get a new process"
        assert sum(line["reason"] is None for line in after) == 4


@pytest.mark.slow
def test_generations_that_do_not_prepare_in_time_share_a_deadline(tmp_path: Path) -> None:
    task = Turns(tmp_path / "turns", "never prepares", to_prepare=4.0)
    start = time.monotonic()
    with Generations([1, 2, 3]) as generations:
        lines = lines_of(task, generations.measure(task, repeats=1))
    assert 4 <= time.monotonic() - start < 8
    assert {line["reason"].partition(",")[0] for line in lines} == {"failed: the process did not answer in time"}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setitem(cases.MODELS, "tiny", (16, 7))
    return Case("fc2", "tiny", images=3, rank=4, dtype="float32")


@pytest.mark.parametrize("generation", ["1", "2"])
def test_rows_of_a_layer(generation: str, tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compared.VARIABLE, generation)
    reasons, measure = LayerTask(tiny, Backend.EAGER, "cpu").prepare()
    rows = ["floor", "efft:eager", *(["packed:eager"] if generation == "2" else [])]
    assert list(reasons) == [(row, phase) for row in rows for phase in ("fwd", "bwd", "fwd_bwd")]
    assert set(reasons.values()) == {None}
    assert measure().keys() == reasons.keys()


def test_packed_factors_are_converted_once_and_give_accurate_results(
    tiny: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    packed = _packed.Stack.packed

    def counted(self: _packed.Stack, *arguments: Any) -> Any:
        found = packed(self, *arguments)
        made.append(found)
        return found

    monkeypatch.setenv(compared.VARIABLE, "2")
    monkeypatch.setattr(_packed.Stack, "packed", counted)
    for module in ("efft_kernels._packed", "efft_kernels.ops.tt_linear"):
        monkeypatch.setattr(sys.modules[module], "BACKENDS", (Backend.EAGER,))
    inputs = tiny.inputs()
    layer, found = judge(Packed(Backend.EAGER), inputs, compared.Budget(inputs))
    assert layer is not None, found
    made.clear()
    for _ in range(2):
        layer.forward_backward()
    assert len(made) == 2
    assert made[0] is not None
    assert made[0] is made[1]


def test_steps_launched_and_as_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, emulated graphs repeat the recorded operators. A graph and a loop must train to the same weights."""
    pytest.importorskip("timm", reason="needs the vision extra")
    monkeypatch.setattr(capture, "graphs_on", lambda device: EmulatedGraphs())
    for module in (capture, compared):
        monkeypatch.setattr(module, "can_capture", lambda device: True)
    built: list[tuple[str, nn.Module]] = []
    build = Setting.build

    def building(self: Setting, row: Any) -> nn.Module:
        built.append((row.name, build(self, row)))
        return built[-1][1]

    monkeypatch.setattr(Setting, "build", building)
    reasons, measure = StepTask(Setting("test_vit", 2, 4, "float32"), Backend.EAGER).prepare()
    assert list(reasons) == [
        (row, variant) for row in ("floor", "efft:eager", "fused:eager") for variant in ("launched", "graph")
    ]
    assert set(reasons.values()) == {None}
    assert measure().keys() == reasons.keys()
    # So far, the launched steps have run three times: twice to warm up, and once in measure(). The graph has run once
    # more, because graph_step trains once before it captures the step.
    launched, graph = (model for name, model in built if name == "efft:eager")
    trained = {name: p.detach().clone() for name, p in graph.named_parameters() if p.requires_grad}
    measure()
    for name, p in launched.named_parameters():
        if name in trained:
            torch.testing.assert_close(p, trained[name], rtol=0, atol=1e-5)  # a step changes an entry by about 1e-4
    assert all(not torch.equal(p, trained[name]) for name, p in graph.named_parameters() if name in trained)


@pytest.mark.slow
def test_the_command_records_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm", reason="needs the vision extra")
    tiny = "--layers-of swin_b.4 --images 1 --model test_vit --batch 1 --rank 2 --repeats 1"
    options = f"--device cpu --backend eager --dtype float32 --generation 2 --results {tmp_path} {tiny}"
    assert main(["generations", *options.split()]) == 0
    lines = read(tmp_path / "generations.jsonl")
    layers = [line for line in lines if "case" in line]
    assert [line["case"] for line in layers] == [c for c in ("qkv", "o", "fc1", "fc2") for _ in range(3)]
    assert all(set(line["ratio"]) == {"fwd", "bwd", "fwd_bwd"} for line in layers)
    steps = [(line["row"], line["cuda_graphs"], line["reason"] is None) for line in lines if "case" not in line]
    rows = ("floor", "efft:eager", "fused:eager")
    assert steps == [(row, graph, not graph) for row in rows for graph in (False, True)]
    assert "all layers, forward and backward" in capsys.readouterr().out


def test_the_ratio_of_a_block_needs_all_its_layers(capsys: pytest.CaptureFixture[str]) -> None:
    def line(case: str, row: str, ms: float, generation: int = 1, reason: str | None = None) -> dict[str, Any]:
        about = {"generation": generation, "case": case, "row": row, "reason": reason}
        return about | ({} if reason else {"seconds": {"fwd_bwd": {"p50": ms / 1e3}}})

    lines = [line("o", "floor", 1), line("o", "row", 2), line("qkv", "floor", 3), line("qkv", "row", 4)]
    lines += [line("o", "floor", 1, 2), line("o", "row", 9, 2), line("qkv", "floor", 1, 2)]
    lines += [line("qkv", "row", 0, 2, "wrong")]
    show_block(lines)
    printed = [text.split() for text in capsys.readouterr().out.splitlines()[2:]]
    assert printed == [
        ["1", "floor", "fwd_bwd", "4.000", "1.000"],
        ["1", "row", "fwd_bwd", "6.000", "1.500"],
        ["2", "floor", "fwd_bwd", "2.000", "1.000"],
    ]
