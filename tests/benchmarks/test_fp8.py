"""Test the benchmark of fp8 products, and the model of a block with such products.

The model is compared with sums by hand, and must agree with the model of the bf16 kernels for what both have.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import fp8_block, fp8_products, tables
from benchmarks.__main__ import main
from benchmarks.fp8_block import DESIGNS, GOAL, block, kernels, largest_fraction, launched, microseconds
from benchmarks.steps import LAYERS, PASSES, TOKENS, Constants, by_gpu, fit
from efft_lab import record
from efft_lab.record import read

N, R = 64 * 197, 32
BY = Constants(own=1.2, launch=4.0, bandwidth=2.0, beside=0.5)


def test_command_measures_every_product(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--quick", "--device", "cpu", "--tokens", "16", "--results", str(tmp_path)]
    assert main(["fp8-products", *options]) == 0
    lines = read(tmp_path / "fp8_products.jsonl")
    assert [(line["case"], line["row"]) for line in lines] == [
        (layer, row) for layer in LAYERS for row in ("bf16", *fp8_products.FP8)
    ]
    for line in lines:
        assert set(line["seconds"]) == set(line["ratio"]) == set(PASSES)
        for error in line["errors"].values():
            # Each operand is rounded to 3 bits of mantissa, with a relative error of about 2.6 %.
            assert error == 0 if line["row"] == "bf16" else 0.02 < error < 0.06, line
    assert {line["tokens"] for line in lines} == {16}
    printed = capsys.readouterr().out
    assert all(f"{layer} {way}" in printed for layer in LAYERS for way in PASSES)


def line_of(layer: str, row: str, fwd: float, bwd: float) -> dict[str, Any]:
    return {"case": layer, "row": row, "seconds": {"fwd": {"p50": fwd}, "bwd": {"p50": bwd}}}


def test_ratio_of_a_block_is_that_of_the_sums() -> None:
    lines = [line_of(layer, "bf16", 3.0, 5.0) for layer in LAYERS] + [
        line_of(layer, "fp8", 1.0, 3.0) for layer in LAYERS
    ]
    assert fp8_products.block_ratio(lines, "fp8") == pytest.approx(0.5)
    lines[-1] = {"case": "fc2", "row": "fp8", "reason": "failed: no fp8"}
    assert fp8_products.block_ratio(lines, "fp8") is None


def test_wrong_or_failing_products_get_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    products = fp8_products.products

    def broken(*arguments: Any) -> Any:
        def fails() -> Any:
            raise RuntimeError("no fp8 here\nmore")

        calls = products(*arguments)
        return {**calls, "fp8": lambda: 1.2 * calls["bf16"](), "fp8-slow": fails}

    monkeypatch.setattr(fp8_products, "products", broken)
    lines = {line["row"]: line for line in fp8_products.measure("o", 16, "cpu", 1)}
    assert lines["fp8"]["reason"].startswith("wrong: the relative error of ")
    assert lines["fp8-slow"]["reason"] == "failed: no fp8 here"
    assert "seconds" in lines["fp8-tensor"]
    assert "seconds" in lines["bf16"]
    assert not any("seconds" in lines[name] for name in ("fp8", "fp8-slow"))


def test_table_of_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert tables.fp8_products() == tables.NOTHING
    facts = {"machine": "Test CPU", "device": "cuda", "gpu": {"name": "Test GPU"}, "versions": {}, "commit": "abc1234"}
    facts |= {"command": "x", "date": "2026-01-02", "dtype": "bfloat16"}
    ratio = {"ratio": {"fwd": {"p50": 0.333}, "bwd": {"p50": 0.6}}}
    lines = [{**line_of(layer, "bf16", 3.0, 5.0), **facts} for layer in LAYERS]
    lines += [{**line_of(layer, "fp8", 1.0, 3.0), **ratio, **facts} for layer in LAYERS]
    lines += [{**line_of(layer, "fp8-tensor", 1.0, 3.0), **ratio, **facts} for layer in ("qkv", "o", "fc1")]
    lines += [{"case": "fc2", "row": "fp8-tensor", "reason": "failed: no memory", **facts}]
    (tmp_path / "fp8_products.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert tables.fp8_products().splitlines()[2:5] == [
        f"| one scale per row | {'0.33 | 0.60 | ' * 4}0.50 |",
        f"| one scale per row, without fast accumulation | {'- | ' * 9}".rstrip(),
        f"| one scale per tensor | {'0.33 | 0.60 | ' * 3}- | - | - |",
    ]


def bytes_of(design: str) -> dict[tuple[str, str, str], int]:
    return {(*kernel.key, kernel.launch.kernel): kernel.launch.bytes for kernel in kernels(design)}


def test_bytes_of_the_layer_fc1() -> None:
    d_in, d_out, h = 768, 3072, 2 * N * R
    separate = bytes_of("separate")
    # A rounding kernel reads bf16 and a factor, and writes fp8, a scale per token, and h or dh.
    assert separate["fc1", "fwd", "rounding"] == 2 * N * d_in + 2 * R * d_in + N * d_in + 4 * N + h
    assert separate["fc1", "bwd", "rounding"] == 2 * N * d_out + 2 * R * d_out + N * d_out + 4 * N + h
    # A product reads both operands in fp8 with their scales, h and a factor, and writes bf16.
    operands = N * d_in + 4 * N + d_out * d_in + 4 * d_out + h + 2 * R * d_out + 2 * d_out
    assert separate["fc1", "fwd", "product"] == operands + 2 * N * d_out
    operands = N * d_out + 4 * N + d_in * d_out + 4 * d_in + h + 2 * R * d_in
    assert separate["fc1", "bwd", "product"] == operands + 2 * N * d_in
    assert separate["fc1", "bwd", "dD and dG"] == (2 * N + 4 * R) * (d_in + d_out) + 2 * h
    fused, merged = bytes_of("fused"), bytes_of("merged")
    assert fused["fc1", "fwd", "in the norm or GELU"] == N * d_in + 4 * N + h
    assert fused["fc1", "bwd", "dG and rounding"] == 3 * N * d_out + 4 * N + 4 * R * d_out + 2 * h
    assert fused["fc1", "bwd", "dD"] == 2 * N * d_in + 4 * R * d_in + h
    assert merged["fc1", "bwd", "in the backward pass of the GELU"] == N * d_out + 4 * N + 4 * R * d_out + 2 * h
    assert merged["qkv", "bwd", "dD of three layers"] == 3 * (2 * N * 768 + 4 * R * 768 + h)


def test_launches_of_a_block() -> None:
    counts = {design: sum(map(launched, kernels(design))) for design in DESIGNS}
    # 8 products; 8 roundings and 4 reductions, or 5 roundings and 4 reductions, or 1 + 3 roundings and 1 reduction.
    assert counts == {"separate": 20, "fused": 17, "merged": 13}


@pytest.mark.parametrize("design", DESIGNS)
def test_time_of_a_block_by_hand(design: str) -> None:
    floor = {(layer, way): 104.0 for layer in LAYERS for way in PASSES}
    expected = 0.0
    for kernel in kernels(design):
        if kernel.launch.kernel == "product":
            k = LAYERS[kernel.key[0]][kernel.key[1] == "bwd"]
            expected += 2.0 + 1.1 * 100.0 * (
                0.6 + 32 / k
            )  # half a launch; half of the distance to the vendor's product
        else:
            part = 0.5 if kernel.launch.kernel == "dD of three layers" else 1.0
            expected += 2.0 * launched(kernel) + part * kernel.launch.bytes / 2e6
    assert block(design, 0.6, floor, BY) * 8 * 104 == pytest.approx(expected)


@pytest.mark.parametrize("design", DESIGNS)
def test_largest_fraction_reaches_the_goal(design: str) -> None:
    for runs in by_gpu().values():
        run, by = runs[-1], fit(runs)
        assert block(design, largest_fraction(design, run.floor, by), run.floor, by) == pytest.approx(GOAL)


def test_no_product_is_limited_by_memory() -> None:
    """Check an assumption of the model: to move the operands takes less time than the product at the best fraction."""
    for runs in by_gpu().values():
        run, by = runs[-1], fit(runs)
        for kernel in kernels("fused"):
            if kernel.launch.kernel == "product":
                time = microseconds(kernel, min(fp8_block.FRACTIONS), run.floor, by)
                assert kernel.launch.bytes / by.bandwidth / 1e6 < time, kernel
    assert TOKENS == N
