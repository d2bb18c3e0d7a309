"""Test the benchmark of one adapted linear layer.

A row is one implementation. All rows must compute the same results, and a row with wrong results must not be timed. The
row "floor" is the frozen baseline.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.__main__ import main
from benchmarks.budget import verdict
from benchmarks.counts import Peaks, Sizes
from benchmarks.ops import cases, rows, run
from benchmarks.ops.cases import Case, Inputs, make_inputs
from benchmarks.ops.rows import ROWS, Layer, LayerRow, under_autograd
from efft_kernels.native import MISSING
from efft_lab.record import read

ROOT = Path(__file__).parents[2]
TINY = Case("qkv", "tiny", images=3, rank=4, dtype="float32")


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.MODELS, "tiny", (16, 7))
    monkeypatch.setattr(run, "measured_peaks", lambda device, dtype: Peaks(1e11, 1e10))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["D", "D stored transposed"])
@pytest.mark.parametrize(
    "row",
    [row for row in ROWS.values() if row.name not in ("lorafusion", "efft:triton", "efft:cuda")],
    ids=lambda row: row.name,
)
def test_every_row_is_within_the_budget(row: LayerRow, transposed: bool, dtype: torch.dtype) -> None:
    if row.name == "peft":
        pytest.importorskip("peft", reason="needs the dev extra")
    inputs = make_inputs(Sizes(61, 48, 96, 16, dtype.itemsize), dtype, n_cores=3, transposed=transposed)
    if row.name == "efft:cpu" and dtype == torch.float16:
        assert row.unavailable(inputs) == "cpu runs bfloat16, float32 tensors, got torch.float16"
        return
    if row.name == "efft:cpu" and MISSING["cpu"] is not None:
        pytest.skip(MISSING["cpu"])
    assert row.unavailable(inputs) is None
    assert verdict(row, inputs) is None


def test_the_triton_row_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="needs the triton extra")
    program = (
        "import torch\n"
        "from benchmarks.budget import verdict\n"
        "from benchmarks.counts import Sizes\n"
        "from benchmarks.ops.cases import make_inputs\n"
        "from benchmarks.ops.rows import ROWS\n"
        "for dtype in (torch.float32, torch.float16):\n"
        "    inputs = make_inputs(Sizes(150, 70, 290, 16, dtype.itemsize), dtype)\n"
        "    print(ROWS['lorafusion'].unavailable(inputs), verdict(ROWS['lorafusion'], inputs))\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout == "None None\n" * 2, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
def test_every_row_on_a_gpu(row: LayerRow) -> None:
    inputs = make_inputs(Sizes(1000, 768, 2304, 16, 2), torch.bfloat16, n_cores=3, device="cuda")
    if row.name == "efft:cpu":
        assert row.unavailable(inputs) == "cpu runs tensors on the CPU, got cuda:0"
        return
    assert row.unavailable(inputs) is None
    assert verdict(row, inputs) is None


def test_the_triton_row_says_why_it_cannot_run() -> None:
    row = ROWS["lorafusion"]
    assert row.unavailable(TINY.inputs()) == "its kernels need a rank that is a power of two and at least 16, got 4"
    inputs = Case("o", "tiny", 3, 16, "float32").inputs()
    assert row.unavailable(inputs) == "Triton needs a GPU, but the inputs are on cpu"


def test_rows_differ_in_work_as_their_explanations_say() -> None:
    """Formulas state how many multiply-adds a row computes in addition to those of the frozen baseline."""
    n, k, d, r = 31, 24, 60, 5
    inputs = make_inputs(Sizes(n, k, d, r, 4), torch.float32, n_cores=3)
    extra = {
        "floor": 0,
        "merged": 0,
        "chain": 3 * n * r * (k + d),
        # +1 because x Aᵀ and gy B are computed twice; -1 because torch's counter ignores addmm_
        "addmm": (3 + 1 - 1) * n * r * (k + d),
        "naive": n * k * d + 3 * k * r * d,  # first term: gradient of the weight; second: dW, dD and dG
        "paper": 3 * n * k * d + 3 * k * r * d,  # x dW and its gradients with respect to x and dW; dW, dD and dG
    }
    for name, expected in extra.items():
        layer = ROWS[name].build(inputs)
        with FlopCounterMode(display=False) as counter:
            layer.forward_backward()
        assert counter.get_total_flops() == 2 * (2 * n * k * d + expected), name


def test_peft_row_is_the_librarys_own_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = pytest.importorskip("peft.tuners.lora.layer", reason="needs the dev extra")
    calls: list[Any] = []
    forward = lora.Linear.forward
    monkeypatch.setattr(lora.Linear, "forward", lambda self, x: calls.append(self) or forward(self, x))
    ROWS["peft"].build(TINY.inputs()).forward()
    (layer,) = calls
    assert (layer.r["default"], layer.scaling["default"]) == (4, 1.0)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == [
        "lora_A.default.weight",
        "lora_B.default.weight",
    ]


class Wrong(LayerRow):
    """Compute a layer whose gradient dG is wrong: it is zero in half of the columns."""

    name, explains = "wrong", "a planted error"

    def build(self, inputs: Inputs) -> Layer:
        def compute(x: Any, D: Any, G: Any) -> Any:
            half = G.shape[1] // 2
            G = torch.cat([G[:, :half], G[:, half:].detach()], 1)
            return F.linear(x, inputs.W, inputs.b) + (x @ D) @ G

        return under_autograd(compute, inputs)


class Broken(LayerRow):
    name, explains = "broken", "raises"

    def build(self, inputs: Inputs) -> Layer:
        raise RuntimeError("no such kernel\nmore")


def test_a_wrong_row_gets_a_reason_and_no_time() -> None:
    wanted = [ROWS["floor"], Wrong(), Broken(), ROWS["lorafusion"], ROWS["efft:eager"]]
    lines = {line["row"]: line for line in run.measure(TINY, wanted, run.Setting(repeats=2))}
    assert list(lines) == ["floor", "wrong", "broken", "lorafusion", "efft:eager"]
    for name, reason in (
        ("wrong", "error over 2 times that of the plain formula in the same precision: dG"),
        ("broken", "failed: RuntimeError: no such kernel"),
        ("lorafusion", "not available: its kernels need a rank"),
    ):
        assert lines[name]["reason"].startswith(reason)
        assert not {"seconds", "ratio", "limit"} & lines[name].keys()
    for name in ("floor", "efft:eager"):
        assert lines[name]["reason"] is None
        assert {len(lines[name][key]) for key in ("seconds", "ratio", "limit", "of_gemm_peak")} == {3}
    assert lines["floor"]["ratio"]["fwd_bwd"] == {"min": 1, "p20": 1, "p50": 1, "p80": 1, "n": 2}
    shown = {text.split()[0]: text for text in run.table(list(lines.values())).splitlines()[1:]}
    assert shown["wrong"] == f"wrong            -- {lines['wrong']['reason']}"
    assert shown["efft:eager"].split()[1] == f"{lines['efft:eager']['ratio']['fwd']['p50']:.3f}"


def test_without_a_floor_nothing_is_timed() -> None:
    class NoFloor(Broken):
        name = "floor"

    lines = run.measure(TINY, [NoFloor(), ROWS["chain"]], run.Setting(repeats=1))
    assert lines[1]["reason"] == "not timed: the frozen baseline failed its check"
    assert "seconds" not in lines[1]


def test_a_device_that_gives_up_ends_the_case_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def give_up(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(run, "time_rows", give_up)
    lines = run.measure(TINY, [ROWS["floor"], ROWS["chain"]], run.Setting())
    assert {line["reason"] for line in lines} == {"timing failed: CUDA out of memory."}


def test_command_writes_a_line_for_every_row_of_every_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["ops", "--quick", "--model", "tiny", "--rank", "4", "--device", "cpu", "--results", str(tmp_path)]
    assert main([*words, "--rows", "efft:eager", "naive", "--repeats", "2"]) == 0
    lines = read(tmp_path / "ops.jsonl")
    assert len(lines) == 4 * 2 * 3
    assert {(line["case"], line["dtype"]) for line in lines} == {
        (case, dtype) for case in ("qkv", "o", "fc1", "fc2") for dtype in ("float32", "bfloat16")
    }
    assert lines[0].keys() >= {"machine", "commit", "command", "tokens", "d_in", "d_out", "device", "peaks"}
    assert {line["tokens"] for line in lines} == {56}
    out = capsys.readouterr().out
    assert "efft:eager      tt_linear of this library" in out
    assert "tiny fc2 [56 x 64 -> 16] rank 4 bfloat16" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "vit_a"], "ops: error: unknown model 'vit_a': did you mean 'vit_"),
        (["--case", "x"], "unknown case 'x': known: qkv, o, fc1, fc2"),
        (["--dtype", "float8"], "unknown dtype 'float8': did you mean 'float"),
        (["--rows", "naiv"], "unknown row 'naiv': did you mean 'naive'?"),
    ],
)
def test_wrong_names(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ops", *words]) == 2
    assert message in capsys.readouterr().err


def test_registry() -> None:
    quick, full = cases.select("quick"), cases.select("full")
    assert {case.sizes.tokens for case in quick} == {1576}
    assert len(quick) == 8
    assert set(quick) & set(full)
    assert len(set(full)) == len(full)
    of_vit_b = [case for case in full if case.model == "vit_b"]
    assert {case.sizes.tokens for case in of_vit_b} == {197, 1576, 12608, 50432}
    assert {case.rank for case in of_vit_b} == {8, 16, 32, 64}
    shapes = {(case.model, case.case): (case.sizes.d_in, case.sizes.d_out) for case in full}
    assert shapes["vit_h", "qkv"] == (1280, 3840)
    assert shapes["swin_b.4", "fc2"] == (4096, 1024)
    fused = Case("qkv", "vit_b", 1, 32, "float32").inputs()
    assert (fused.n_cores, fused.D.is_contiguous()) == (3, True)
    assert Case("fc2", "vit_b", 1, 32, "float32").inputs().D.t().is_contiguous()


def test_update_is_as_large_as_the_base() -> None:
    inputs = Case("qkv", "vit_b", 1, 32, "float32").inputs()
    assert ((inputs.D @ inputs.G).norm() / inputs.W.norm()).item() == pytest.approx(1, abs=0.1)


def test_rows_are_selected_in_the_order_of_the_table_with_the_floor() -> None:
    assert [row.name for row in rows.select(["naive", "efft:eager"])] == ["floor", "efft:eager", "naive"]
    assert [row.name for row in rows.select(None)] == list(ROWS)
