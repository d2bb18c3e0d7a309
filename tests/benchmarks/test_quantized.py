"""Test the benchmark of quantized models: the errors and sizes of all formats, and the reasons for missing formats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.__main__ import main
from benchmarks.model.step import Setting
from benchmarks.quantized import ROWS, QuantizedRow, build, measure, stored_bytes, weight_bytes
from efft.adapting.inject import adapted_layers
from efft_lab.record import read
from tests.quantized import to_int8

pytest.importorskip("timm", reason="needs the vision extra")
pytest.importorskip("torchao", reason="needs torchao: pip install 'efft-kernels[dev]'")

TINY = Setting("test_vit", batch=2, rank=4)


def test_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "quantized --quick --model test_vit --batch 2 --rank 4 --device cpu --dtype float32 bfloat16 --repeats 1"
    assert main([*command.split(), "--results", str(tmp_path)]) == 0
    lines = read(tmp_path / "quantized.jsonl")
    assert [(x["dtype"], x["row"]) for x in lines] == [(d, row) for d in ("float32", "bfloat16") for row in ROWS]
    size = {}
    for line in lines:
        if line["row"] == "fp8-dynamic":
            assert "requires CUDA compute capability" in line["reason"], "torchao says this on a CPU"
            continue
        assert "reason" not in line, line
        assert line["ratio"]["fwd"]["n"] == line["ratio"]["fwd_bwd"]["n"] == 1
        # The error is small without quantization (it comes from bf16), larger with 8 bits and largest with 4 bits.
        least, most = {"dense": (0, 1e-2), "nf4": (2e-2, 1)}.get(line["row"], (1e-3, 0.1))
        assert least <= line["error"] < most, line
        size[line["dtype"], line["row"]] = line["weight_bytes"]
    assert lines[0]["error"] == 0
    dense = size["float32", "dense"]
    for name, least, most in (("int8", 1 / 4, 0.28), ("fp8", 1 / 4, 0.28), ("nf4", 1 / 8, 0.14)):
        assert least < size["float32", name] / dense < most, name
    assert "inference ms" in capsys.readouterr().out


def test_only_the_adapted_layers_are_quantised() -> None:
    model = build(TINY, QuantizedRow("", "", to_int8))
    layers = list(adapted_layers(model).values())
    assert {type(layer.weight).__name__ for layer in layers} == {"Int8"}
    assert type(model.head.weight) is nn.Parameter
    assert weight_bytes(model) == sum(layer.weight.numel() + 4 * layer.out_features for layer in layers)
    assert stored_bytes(torch.zeros(3, 5, dtype=torch.float16)) == 30


def test_a_format_that_is_missing_does_not_stop_the_others() -> None:
    def missing(layer: nn.Module) -> None:
        raise ImportError("no module named torchao")

    dense, other = measure(TINY, [ROWS["dense"], QuantizedRow("int8", "", missing)], repeats=1)
    assert other["reason"] == "failed: no module named torchao"
    assert dense["seconds"]["fwd_bwd"]["n"] == 1
