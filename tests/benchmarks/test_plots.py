"""Test that pictures and tables show the values in result files, name the machine, and label modeled values."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import study_tables, tables
from benchmarks.__main__ import main
from benchmarks.model_roofline import block_times, vit_block
from benchmarks.plots import accuracies, draw, model_ratios, ops_ratios, roofline, scaling, subspaces
from benchmarks.readme import render
from benchmarks.roofline_gpu import Machine
from efft_lab import record

pytest.importorskip("matplotlib", reason="needs the train extra")

FACTS: dict[str, Any] = {
    "date": "2026-01-02T03:04:05+00:00",
    "machine": "Test CPU",
    "gpu": {"name": "Test GPU", "driver": "1", "cuda": "1"},
    "versions": {"python": "3.12", "torch": "2.10"},
    "commit": "abc1234",
    "command": "python -m benchmarks x",
}


def q(p50: float) -> dict[str, float]:
    return {"min": 0.8 * p50, "p20": 0.9 * p50, "p50": p50, "p80": 1.2 * p50, "n": 5}


def ops_line(row: str, ratio: float, case: str = "o", device: str = "cpu", **more: Any) -> dict[str, Any]:
    images = 8 if device == "cpu" else 64
    about = {"suite": "ops", "case": case, "model": "vit_b", "images": images, "rank": 32, "tokens": 197 * images}
    figures = {"seconds": {"fwd_bwd": q(ratio / 100)}, "ratio": {"fwd_bwd": q(ratio)}, "limit": {"fwd_bwd": 1.1}}
    peaks = {"peaks": {"flops_per_s": 8e10, "bytes_per_s": 1e10}}
    achieved = {"of_gemm_peak": {"fwd_bwd": 0.5}, "of_copy_peak": {"fwd_bwd": 0.25}, **peaks}
    return {**FACTS, **about, "dtype": "bfloat16", "device": device, "row": row, **figures, **achieved, **more}


def model_line(row: str, ratio: float, **more: Any) -> dict[str, Any]:
    about = {"suite": "model", "model": "vit_base_patch16_224", "batch": 8, "rank": 32, "dtype": "float32"}
    figures = {"seconds": q(ratio), "ratio": q(ratio), "images_per_s": 8 / ratio, "saved_bytes": 2**20}
    sizes = {"trainable": 1234567, "adapter_bytes": 983040}
    return {**FACTS, **about, "device": "cpu", "row": row, **figures, **sizes, **more}


def refused(line: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in line.items() if k not in ("seconds", "ratio", "limit", "peaks")} | {"reason": "wrong: y"}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    return tmp_path


def write(folder: Path, name: str, lines: Iterable[dict[str, Any]]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_bars_are_the_medians_and_whiskers_the_quantiles() -> None:
    lines = [ops_line("floor", 1.0), ops_line("naive", 1.5), refused(ops_line("paper", 9.0))]
    ((name, figure),) = ops_ratios(lines)
    (axes,) = figure.axes
    assert name == "ops_cpu_vit_b_8_32_bfloat16"
    assert [bar.get_width() for bar in axes.patches] == [1.0, 1.5]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["floor", "naive"]
    (whiskers,) = (container.errorbar for container in axes.containers if hasattr(container, "errorbar"))
    segments = whiskers.lines[2][0].get_segments()
    assert segments[1][:, 0].tolist() == pytest.approx([1.35, 1.8])
    assert "Test CPU; commit abc1234" in axes.get_title()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["o, measured"]


def test_modelled_ratios_stand_beside_those_of_a_gpu_only() -> None:
    lines = [ops_line(row, 1.0 + i, device="cuda") for i, row in enumerate(("floor", "naive", "merged-by-hand"))]
    ((_, figure),) = ops_ratios(lines)
    axes = figure.axes[0]
    assert "Test GPU" in axes.get_title()
    (modeled,) = (line for line in axes.lines if "modeled" in str(line.get_label()))
    times = block_times(Machine(), 12608, 32, vit_block(768))
    assert list(modeled.get_xdata()) == pytest.approx([1.0, times["naive"]["o"] / times["floor"]["o"]])
    assert modeled.get_fillstyle() == "none"
    assert any("not measured" in text.get_text() for text in axes.get_legend().get_texts())


def test_only_the_newest_run_is_drawn() -> None:
    old = {"date": "2025-01-01T00:00:00+00:00"}
    lines = [model_line("floor", 1.0, **old), model_line("gone", 7.0, **old), model_line("floor", 1.0)]
    ((_, figure),) = model_ratios(lines)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["floor"]


def test_steps_with_and_without_cuda_graphs_stay_apart(results: Path) -> None:
    plain = [model_line(row, ratio, device="cuda") for row, ratio in (("floor", 1.0), ("peft", 2.0))]
    graphs = [{**line, "cuda_graphs": True, "ratio": q(1.1)} for line in plain]
    # A line without the field ``cuda_graphs`` belongs to a step without CUDA graphs.
    older = [{**line, "cuda_graphs": False, "date": "2025-01-01T00:00:00+00:00"} for line in plain]
    write(results, "model", [*older, *plain, *graphs])
    assert tables.TABLES["train_step_gpu"]().splitlines()[3].startswith("| LoRA of `peft` | 2.00 |")
    assert tables.TABLES["train_step_gpu_graphs"]().splitlines()[3].startswith("| LoRA of `peft` | 1.10 |")
    names = [name for name, _ in model_ratios([*older, *plain, *graphs])]
    stem = "model_cuda_vit_base_patch16_224_8_32_float32"
    assert names == [stem, f"{stem}_graphs"]


def test_roofline_points_lie_at_what_was_achieved() -> None:
    ((_, figure),) = roofline([ops_line("floor", 1.0)])
    point, roof = figure.axes[0].lines
    assert (point.get_xdata()[0], point.get_ydata()[0]) == pytest.approx((16.0, 4e10))  # 4e10 FLOP/s, 2.5e9 byte/s
    assert max(roof.get_ydata()) == 8e10


def test_scaling_is_drawn_in_order_of_size_with_its_exponent() -> None:
    lines = [
        ops_line("naive", ratio, suite="scaling", sweep="tokens", tokens=tokens)
        for tokens, ratio in ((394, 2.0), (197, 1.0))
    ]
    about = {k: v for k, v in lines[0].items() if k not in ("seconds", "ratio", "tokens", "peaks")}
    ((name, figure),) = scaling([*lines, {**about, "sizes": [197, 394], "exponent": 1.0}])
    (line,) = figure.axes[0].lines
    assert name == "scaling_cpu_vit_b_o_tokens_bfloat16"
    assert list(line.get_xdata()) == [197, 394]
    assert list(line.get_ydata()) == pytest.approx([0.01, 0.02])
    assert line.get_label() == "naive, measured, exponent 1.00"


def test_subspaces_are_means_over_the_newest_runs_of_all_tasks(results: Path) -> None:
    def line(of: str, task: str, shared: float) -> dict[str, Any]:
        measured = {"own": 0.9, "shared": shared, "independent": 0.1}
        return {**FACTS, "of": of, "set": "mhsa", "task": task, "seed": 0, "rank": 16, **measured}

    lines = [line("update", "a", 0.9), line("update", "a", 0.2), line("update", "b", 0.4), line("gradient", "a", 0.6)]
    ((stem, figure),) = subspaces(lines)
    axes = figure.axes[0]
    shared = axes.containers[1]
    assert (stem, shared.get_label()) == ("subspaces", "one pair of bases")
    assert [bar.get_width() for bar in shared] == pytest.approx([0.6, 0.3])
    write(results, "subspaces", lines)
    assert main(["plot", "subspaces", "--results", str(results), "--out", str(results / "out")]) == 0
    assert [path.name for path in (results / "out").iterdir()] == ["subspaces.png"]


def test_accuracies_of_a_study_are_means_over_seeds_within_their_range(results: Path) -> None:
    def line(row: str, task: str, seed: int, accuracy: float) -> dict[str, Any]:
        return {**FACTS, "row": row, "task": task, "seed": seed, "test_accuracy": accuracy}

    lines = [line("a", "x", 0, 0.1), line("a", "x", 0, 0.5), line("a", "x", 1, 0.7), line("b", "y", 0, 0.9)]
    ((stem, figure),) = accuracies("text", lines)
    x, y = (each for each in figure.axes[0].containers if hasattr(each, "patches"))
    assert (stem, x.get_label(), y.get_label()) == ("text", "x", "y")
    assert [bar.get_width() for bar in [*x, *y]] == pytest.approx([60, 90])
    (whisker,) = x.errorbar.lines[2][0].get_segments()
    assert [at for at, _ in whisker] == pytest.approx([50, 70])
    assert list(accuracies("text", [])) == []
    write(results, "starts", [{**lines[0], "kind": "side", "source": "random"}])
    assert [path.name for path in draw(results, results / "out", ["starts"])] == ["starts.png"]


def test_command_draws_every_result_file(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(results, "ops", [ops_line("floor", 1.0)])
    write(results, "model", [model_line("floor", 1.0)])
    out = results / "out"
    assert main(["plot", "--results", str(results), "--out", str(out)]) == 0
    assert {path.name.split("_")[0] for path in out.glob("*.png")} == {"ops", "roofline", "model"}
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert draw(results / "nowhere", out) == []


def test_accuracies_on_record_are_drawn(tmp_path: Path) -> None:
    written = draw(None, tmp_path, ["compare_local_grid", "compare_local"])
    names = {path.name for path in written}
    assert {"compare_local-parameters.png", "compare_local_grid-efft2.png"} <= names
    assert all(path.parent == tmp_path and path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_tables_of_what_was_not_run_say_so(results: Path) -> None:
    assert all(make() == tables.NOTHING for make in [*tables.TABLES.values(), *study_tables.TABLES.values()])


def test_training_step_table(results: Path) -> None:
    old = model_line("efft:eager", 9.0, date="2025-01-01T00:00:00+00:00")
    half = [model_line(row, ratio, dtype="bfloat16") for row, ratio in (("floor", 1.0), ("efft:eager", 1.25))]
    full = [model_line("floor", 1.0), model_line("efft:eager", 1.5), refused(model_line("paper", 2.0))]
    write(results, "model", [old, *full, *half])
    lines = tables.train_step("cpu").splitlines()
    assert lines[2:4] == [
        "| frozen baseline | 1.00 | 8.0 | 1.00 | 8.0 |",
        "| EFFT2, backend eager | 1.50 | 5.3 | 1.25 | 6.4 |",
    ]
    assert not any("paper" in line for line in lines)
    assert lines[-1] == (
        "- bfloat16: `python -m benchmarks x`, commit abc1234, Test CPU; python 3.12, torch 2.10; 2026-01-02"
    )


def test_layer_table_on_a_gpu_has_the_block_measured_and_modelled(results: Path) -> None:
    layers = ("qkv", "o", "fc1", "fc2")
    lines = [ops_line(row, ratio, layer, "cuda") for row, ratio in (("floor", 1.0), ("naive", 2.0)) for layer in layers]
    write(results, "ops", lines)
    header, _, floor, naive, limit, *_ = tables.ops("cuda").splitlines()
    assert header.endswith("| block, bfloat16 | block, modeled for an H200, not measured |")
    assert floor.endswith("| 1.00 | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 |")
    assert naive.endswith("| 2.00 | 2.00 | 2.00 | 2.00 | 2.00 | 1.78 |")
    assert limit == "| arithmetic limit | 1.10 | 1.10 | 1.10 | 1.10 | - | 1.08 |"
    assert tables.ops("cpu") == tables.NOTHING


def test_memory_and_inference_tables(results: Path) -> None:
    bytes_of = {"saved_bytes": 280 * 2**20, "peak_bytes": 3 * 2**30, "level": "model"}
    write(results, "memory", [model_line("floor", 1.0, **bytes_of), refused(model_line("peft", 1.0, level="model"))])
    write(results, "model", [model_line("floor", 1.0)])
    write(results, "serve", [model_line(row, r, ratio_to_base=q(r)) for row, r in (("base", 1.0), ("merged", 1.01))])
    assert tables.memory("cpu").splitlines()[2] == "| frozen baseline | 280 MiB | 3072 MiB | 1,234,567 | 0.98 MB |"
    assert tables.serve("cpu").splitlines()[2:4] == [
        "| plain model | 1.00 |",
        "| EFFT2 merged into the weights | 1.01 |",
    ]


def test_table_of_many_adapters(results: Path) -> None:
    size = {"bytes_per_adapter": 3 * 2**19}
    lines = [model_line("merged", 1.0, ratio_to_base=q(1.0)), refused(model_line("pool:100", 1.0))]
    for name, one, merged in (("pool:1000", 1.5, 3.0), ("pool:1", 1.0, 2.0)):
        lines.append(model_line(name, 1.0, ratio_to_one_adapter=q(one), ratio_to_merged=q(merged), **size))
    write(results, "serve", lines[:1])
    assert tables.many_adapters("cpu") == tables.NOTHING
    write(results, "serve", lines)
    assert tables.many_adapters("cpu").splitlines()[:4] == [
        "| time | float32, batch 8, / one | float32, batch 8, / merged | float32, size of an adapter |",
        "| --- | --- | --- | --- |",
        "| EFFT2, one adapter from a pool | 1.00 | 2.00 | 1.50 MiB |",
        "| EFFT2, one of 1000 adapters per image | 1.50 | 3.00 | 1.50 MiB |",
    ]
    assert tables.many_adapters("cuda") == tables.NOTHING


def test_table_of_quantised_backbones(results: Path) -> None:
    more = {"error": 0.0123, "weight_bytes": 85 * 2**20, "ratio": {"fwd": q(1.25), "fwd_bwd": q(1.5)}}
    int8 = model_line("int8", 1.0) | more
    write(results, "quantized", [int8, refused(model_line("fp8-dynamic", 1.0))])
    dense, eight, *_, nf4 = tables.quantized("cpu").splitlines()[2:8]
    assert dense == "| not quantized | - | - | - | - |"
    assert eight == "| int8 | 1.2e-02 | 85 | 1.25 | 1.50 |"
    assert nf4 == "| nf4 | - | - | - | - |"
    assert tables.quantized("cuda") == tables.NOTHING


def test_blocks_of_a_text_are_filled(results: Path) -> None:
    write(results, "model", [model_line("floor", 1.0)])
    text = "before\n<!-- table: train_step -->\nold\n<!-- end -->\nafter\n"
    assert render(text) == text.replace("old", tables.train_step("cpu"))
    assert render(render(text)) == render(text)


def test_command_prints_a_table_or_names_what_there_is(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tables", "serve_gpu"]) == 0
    assert capsys.readouterr().out.strip() == tables.NOTHING
    with pytest.raises(SystemExit):
        main(["tables", "serv"])
    message = "unknown table 'serv'; expected one or more of summary, parameters, train_step, ops"
    assert message in capsys.readouterr().err
