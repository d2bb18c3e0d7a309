"""Test the inference benchmark. Each row is one way to serve a model, and only accurate rows are timed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import efft
from benchmarks import serve
from benchmarks.__main__ import main
from benchmarks.model.rows import adapted
from benchmarks.model.step import Setting
from benchmarks.serve import ROWS, ManyAdapters, ServeRow, build_checked, measure
from efft.graphs import capture
from efft.pool.selecting import FixedBatch
from efft_kernels import can_run
from efft_lab.record import read
from tests.efft.graphs import emulation
from tests.efft.graphs.emulation import EmulatedGraphs

pytest.importorskip("timm", reason="needs the vision extra")
pytest.importorskip("peft", reason="needs the dev extra")

TINY = Setting("test_vit", batch=2, rank=4)


def test_every_row_is_measured_at_every_batch_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row for row in ROWS if row not in ("pool:100", "pool:1000", "graph:pool:1000")]  # slow, and like pool:10
    command = ["serve", "--model", "test_vit", "--batch", "1", "2", "--rank", "4", "--device", "cpu"]
    assert main([*command, "--repeats", "1", "--results", str(tmp_path), "--rows", *rows]) == 0
    lines = read(tmp_path / "serve.jsonl")
    assert [(x["dtype"], x["batch"], x["row"]) for x in lines] == [
        (dtype, batch, row) for dtype in ("float32", "bfloat16") for batch in (1, 2) for row in rows
    ]
    for line in lines:
        backend = ROWS[line["row"]].backend
        missing = None if backend is None else can_run(backend, torch.ones(1))
        if ROWS[line["row"]].graphs:
            missing = "CUDA graphs need a GPU, and the device is cpu"
        if missing is not None:
            assert line["reason"] == f"not available: {missing}"
            continue
        assert "reason" not in line, line
        assert line["images_per_s"] == pytest.approx(line["batch"] / line["seconds"]["p50"])
        assert line["ratio_to_base"]["n"] == 1
        assert line["ratio_to_merged"]["n"] == 1
        assert line["ratio_to_one_adapter"]["n"] == 1
        assert ("bytes_per_adapter" in line) == line["row"].startswith("pool:")
    assert "ratio to base" in capsys.readouterr().out


def test_merged_is_what_was_merged() -> None:
    models = build_checked(TINY, [ROWS["merged"], ROWS["base"]])
    merged, base = models["merged"], models["base"]
    assert isinstance(merged, nn.Module)
    assert isinstance(base, nn.Module)
    assert all(layer.merged for layer in efft.adapting.inject.adapted_layers(merged).values())
    images, _ = TINY.examples(base)
    with torch.inference_mode():
        assert not torch.allclose(merged(images), base(images))


def test_adapters_of_a_pool_are_many_and_used_in_turn() -> None:
    model = build_checked(TINY, [ROWS["pool:10"]])["pool:10"]
    assert isinstance(model, ManyAdapters)
    assert len(model.pool.names) == 10
    used: list[list[str]] = []
    use = model.pool.use
    model.pool.use = lambda names: used.append(names) or use(names)  # type: ignore[method-assign,assignment,func-returns-value]
    model.next = 0
    images, _ = TINY.examples(model, 4)
    for _ in range(3):
        model(images)
    assert used == [list("0123"), list("4567"), list("8901")]


@pytest.fixture
def _emulated_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU emulate graphs, which repeat the recorded operators."""
    for module in (capture, serve):
        monkeypatch.setattr(module, "graphs_on", lambda device: EmulatedGraphs())
        monkeypatch.setattr(module, "can_capture", lambda device: True)
    # On the CPU, the pool reads the numbers of the adapters to check them.
    checks = {torch.ops.aten._local_scalar_dense.default}
    monkeypatch.setattr(emulation, "_REFUSED", emulation._REFUSED - checks)


@pytest.mark.usefixtures("_emulated_graphs")
def test_rows_with_graphs() -> None:
    rows = [ROWS[name] for name in ("base", "graph:base", "graph:efft", "graph:pool:10")]
    lines = measure(TINY, rows, [1, 3], repeats=1)
    assert [(line["batch"], line["row"]) for line in lines] == [(batch, row.name) for batch in (1, 3) for row in rows]
    assert all("seconds" in line for line in lines), lines


@pytest.mark.usefixtures("_emulated_graphs")
def test_a_graph_of_a_pool_uses_adapters_in_turn_and_the_images_of_each_call() -> None:
    models = build_checked(TINY, [ROWS["graph:pool:10"], ROWS["efft:eager"]])
    pooled, alone = models["graph:pool:10"], models["efft:eager"]
    assert isinstance(pooled, ManyAdapters)
    assert isinstance(alone, nn.Module)
    chosen: list[list[str | None]] = []
    choose = FixedBatch.select
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FixedBatch, "select", lambda self, names: chosen.append(names) or choose(self, names))
        pooled.next = 8
        for seed in range(2):
            images = torch.randn(3, 3, 160, 160, generator=torch.Generator().manual_seed(seed))
            with torch.inference_mode():
                torch.testing.assert_close(pooled(images), alone(images), rtol=1e-3, atol=1e-4)
    assert chosen == [["8", "9", "0"], ["1", "2", "3"]]


def test_adapters_that_do_not_fit_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.serve.available_memory", lambda: 100)
    reason = build_checked(TINY, [ROWS["pool:100"]])["pool:100"]
    assert isinstance(reason, str)
    assert reason.startswith("failed: 100 adapters need")


def _wrong(model: nn.Module) -> None:
    with torch.no_grad():
        dict(efft.named_factors(model))["efft.mhsa.V"].mul_(1.01)
    efft.merge(model)


def test_a_wrong_row_gets_no_time() -> None:
    planted = ServeRow("merged", "", adapted, _wrong, is_efft=True)
    base, wrong = measure(TINY, [ROWS["base"], planted], [1], repeats=1)
    assert wrong["reason"].startswith("wrong: logits: error")
    assert not {"seconds", "ratio_to_base", "images_per_s"} & wrong.keys()
    assert "seconds" in base


def test_a_row_that_breaks_does_not_stop_the_others() -> None:
    def broken(model: nn.Module, rank: int) -> nn.Module:
        raise ImportError("peft is not installed")

    base, line = measure(TINY, [ROWS["base"], ServeRow("peft", "", broken)], [1], repeats=1)
    assert line["reason"] == "failed: peft is not installed"
    assert "seconds" in base
