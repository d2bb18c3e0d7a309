"""Test the study of frozen products in fp8: the rounding, the products and their gradients, and the table.

The rounding is compared with a search among all numbers of the format, and the forward product with torch's own fp8
product. The setting ``forward`` must give the results of this library with weights that torchao has quantized.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efft
from benchmarks import study_tables, tables
from efft.adapting.adapter import adapted_layers
from efft_kernels import EfftLinear
from efft_lab import record
from efft_lab.studies import fp8
from efft_lab.studies.fp8 import SETTINGS, Fp8Linear, Product, Rounded, Setting, Weights, round_layers
from efft_lab.train import TrainConfig
from tests.efft.conftest import Make
from tests.quantized import to_float8_rows

FP8 = ("e4m3", "e5m2", "tensor", "forward")
#: For each format: the bits of the exponent, the bits of the mantissa, the bias of the exponent, the largest number.
FORMATS = {torch.float8_e4m3fn: (4, 3, 7, 448.0), torch.float8_e5m2: (5, 2, 15, 57344.0)}


def setting_of(name: str) -> Setting:
    setting = SETTINGS[name]
    assert setting is not None
    return setting


def numbers(dtype: torch.dtype) -> Tensor:
    """Return all finite numbers of a format that are not negative, in ascending order, from the format's definition."""
    exponent, mantissa, bias, largest = FORMATS[dtype]
    found = [
        2.0 ** (max(e, 1) - bias) * ((e > 0) + m / 2**mantissa) for e in range(2**exponent) for m in range(2**mantissa)
    ]
    return torch.tensor([x for x in found if x <= largest], dtype=torch.float64)


def nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the nearest numbers of the format. Of two numbers at the same distance, the one with the even code."""
    table = numbers(dtype)
    distance = (values.double().abs()[..., None] - table).abs()
    code = distance.argmin(-1)  # the smaller of two equally near numbers
    tie = distance.gather(-1, (code + 1).clamp(max=len(table) - 1)[..., None])[..., 0] == distance.amin(-1)
    code = torch.where(tie & (code % 2 == 1), (code + 1).clamp(max=len(table) - 1), code)
    return table[code] * values.double().sign()


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("dtype", list(FORMATS))
def test_rounding_finds_the_nearest_numbers(dtype: torch.dtype, rows: bool) -> None:
    torch.manual_seed(0)
    # The exponents span more than those of the format, so that small numbers become subnormal or zero.
    values = torch.randn(20, 300) * 2.0 ** torch.randint(-40, 1, (20, 300))
    values[0], values[1, 0] = 0.0, 3e4
    largest = FORMATS[dtype][-1]
    scale = (values.abs().amax(1, keepdim=True) if rows else values.abs().amax()) / largest
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    expected = nearest(values / scale, dtype) * scale
    found = Rounded.of(values, dtype, rows).dense()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", list(FORMATS))
def test_every_number_of_the_format_stays_the_same(dtype: torch.dtype) -> None:
    values = numbers(dtype).float()
    for factor in (1.0, -4.0):
        assert Rounded.of(factor * values[None], dtype, True).dense().tolist() == [(factor * values).tolist()]


def inputs(tokens: int = 33, d_in: int = 48, d_out: int = 80, rank: int = 5) -> dict[str, Any]:
    """Return x and gy in bf16, and W, b, D and G in fp32, with outliers in some channels."""
    torch.manual_seed(0)
    x, gy, W = torch.randn(tokens, d_in), torch.randn(tokens, d_out), torch.randn(d_out, d_in) / d_in**0.5
    x[:, 3] *= 30
    W[7] *= 10
    D, G, b = torch.randn(d_in, rank) / d_in**0.5, 0.3 * torch.randn(rank, d_out), torch.randn(d_out)
    return {"x": x.bfloat16(), "gy": gy.bfloat16(), "W": W, "b": b, "D": D, "G": G}


def run(of: dict[str, Any], setting: Setting) -> dict[str, Tensor]:
    """Return the output and the gradients of the product."""
    leaves = {name: of[name].clone().requires_grad_() for name in ("x", "b", "D", "G")}
    y = Product.apply(leaves["x"], Weights.of(of["W"], setting), leaves["b"], leaves["D"], leaves["G"], setting)
    y.backward(of["gy"])
    gradients = {f"d{name}": leaf.grad for name, leaf in leaves.items()}
    return {"y": y.detach(), **gradients}


def error(found: Tensor, exact: Tensor) -> float:
    return float(((found.detach().double() - exact).norm() / exact.norm()).detach())


@pytest.mark.parametrize("name", FP8)
def test_products_against_the_formula_in_fp64(name: str) -> None:
    setting, of = setting_of(name), inputs()
    found = run(of, setting)
    x, gy, W, b, D, G = (of[name].double() for name in ("x", "gy", "W", "b", "D", "G"))

    def scaled(values: Tensor, dtype: torch.dtype) -> Tensor:
        largest = values.abs().amax(1, keepdim=True) if setting.rows else values.abs().amax()
        scale = (largest / FORMATS[dtype][-1]).float()  # scales are in fp32
        return nearest(values.float() / scale, dtype) * scale.double()

    forward = scaled(W, setting.x)
    backward = forward if setting.gy is None else scaled(W.T, setting.x).T
    h, dh = x @ D, gy @ G.T
    exact = {
        "y": scaled(x, setting.x) @ forward.T + h @ G + b,
        "dx": (gy if setting.gy is None else scaled(gy, setting.gy)) @ backward + dh @ D.T,
        "dD": x.T @ dh,
        "dG": h.T @ gy,
        "db": gy.sum(0),
    }
    for key, tensor in exact.items():
        assert error(found[key], tensor) < 4e-3, key  # the products, the outputs, h and dh are rounded to bf16
    # The rounding to fp8 is much larger, and it does not reach the gradients of the parameters.
    unrounded = x @ W.T + h @ G + b
    assert 1e-2 < error(found["y"], unrounded) < 6e-2
    assert found["dD"].dtype == found["dG"].dtype == found["db"].dtype == torch.float32


@pytest.mark.parametrize("name", ["e4m3", "tensor"])
def test_forward_product_equals_that_of_torch(name: str) -> None:
    setting, of = setting_of(name), inputs(48, 64, 96)

    def operands(values: Tensor) -> tuple[Tensor, Tensor]:
        largest = values.float().abs().amax(1, keepdim=True) if setting.rows else values.float().abs().amax()
        scale = largest / 448
        return (values.float() / scale).to(torch.float8_e4m3fn), scale

    (x, scale_x), (W, scale_W) = operands(of["x"]), operands(of["W"])
    scale_W = scale_W.T.contiguous() if setting.rows else scale_W
    expected = torch._scaled_mm(x, W.t(), scale_a=scale_x, scale_b=scale_W, out_dtype=torch.float32)
    zero = {**of, "G": torch.zeros_like(of["G"]), "b": torch.zeros_like(of["b"])}
    assert (
        error(run(zero, setting)["y"], expected.double()) < 3e-3
    )  # the rounding of the product and the output to bf16


def test_library_rounds_in_the_same_way_with_the_weights_of_torchao() -> None:
    linear = nn.Linear(64, 96).bfloat16().requires_grad_(False)
    torch.manual_seed(0)
    layer = EfftLinear.from_linear(linear, rank=4, init="u")
    nn.init.normal_(layer.factors.U)
    own = EfftLinear.from_linear(nn.Linear(64, 96).bfloat16(), layer.factors, rank=16)
    own.load_state_dict({"weight": linear.weight, "bias": linear.bias}, strict=False)
    round_one(own, setting_of("forward"))
    to_float8_rows(layer)
    x = torch.randn(16, 64).bfloat16()
    results = []
    for each in (layer, own):
        of = x.clone().requires_grad_()
        y = each(of)
        y.float().square().sum().backward()
        results.append((y.detach().double(), of.grad.double()))  # type: ignore[union-attr]
    for found, expected in zip(*results, strict=True):
        assert error(found, expected) < 6e-3  # the sum of the product and the update is rounded once or twice


def round_one(layer: EfftLinear, setting: Setting) -> None:
    layer.__class__ = Fp8Linear
    changed: Any = layer
    changed.setting, changed.weights = setting, Weights.of(layer.stored, setting)


def test_every_adapted_layer_of_a_model_is_rounded(tiny_vit: Make, images: Tensor) -> None:
    outputs: dict[str, Tensor] = {}
    for name in ("bf16", "e4m3"):
        torch.manual_seed(0)
        model = efft.apply(tiny_vit(), efft.EfftConfig(rank=2))
        if name == "e4m3":
            round_layers(model, setting_of(name))
            assert {type(layer) for layer in adapted_layers(model).values()} == {Fp8Linear}
        with torch.autocast("cpu", torch.bfloat16):
            outputs[name] = model(images)
        outputs[name].float().square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert 1e-3 < error(outputs["e4m3"], outputs["bf16"].double()) < 0.3


def test_other_layers_are_refused() -> None:
    convolution = efft.apply(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2)), efft.EfftConfig(rank=2, targets=["0"])
    )
    with pytest.raises(TypeError, match="expected an EfftLinear, got"):
        round_layers(convolution, setting_of("e4m3"))


def test_configuration_is_that_of_the_suite() -> None:
    fields = fp8.configuration("orientation", 1)
    recorded = next(
        line
        for line in tables.read("compare_twelve")
        if (line["method"], line["task"], line["seed"], line["stage"]) == (fp8.METHOD, "orientation", 1, "final")
    )
    now = TrainConfig.from_dict(fields).to_dict()
    differing = {name for name in recorded["config"] if recorded["config"][name] != now[name]}
    assert differing <= {"efft"}  # a newer version may have more settings, with defaults that change nothing
    assert recorded["config"]["efft"].items() <= now["efft"].items()


def test_finished_runs_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def study(name: str, fields: dict[str, Any]) -> dict[str, Any]:
        ran.append((name, fields["data"], fields["seed"]))
        return {"logits_error": 0.1, "gradients_error": 0.2, "test_accuracy": 0.5}

    monkeypatch.setattr(fp8, "study", study)
    monkeypatch.setattr(fp8.worker, "choose_attention", lambda: None)
    for tasks in (["count"], ["count", "cifar10"]):
        options = ["--tasks", *tasks, "--seeds", "1", "0", "--settings", "tensor", "--results", str(tmp_path)]
        assert fp8.main(options) == 0
    assert ran == [("tensor", task, seed) for task in ("count", "cifar10") for seed in (1, 0)]
    assert len(record.read(tmp_path / "fp8.jsonl")) == 4


def test_table_compares_runs_with_those_in_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert study_tables.fp8() == tables.NOTHING
    facts = {"machine": "Test CPU", "versions": {}, "commit": "abc1234", "command": "x", "date": "2026-01-02"}
    line = {"setting": "e4m3", "task": "count", "logits_error": 0.1, "gradients_error": 0.2, **facts}
    lines = [
        {**line, "seed": 0, "test_accuracy": 0.5},
        {**line, "seed": 1, "test_accuracy": 0.6, "logits_error": 0.3},
        {**line, "seed": 7, "test_accuracy": 0.9, "logits_error": 0.2},  # there is no run in bf16 with this seed
        {**line, "setting": "bf16", "seed": 0},
    ]
    suite = {"method": "EFFT, auto", "stage": "final", "task": "count"}
    bf16 = [{**suite, "seed": 0, "test_accuracy": 0.51}, {**suite, "seed": 1, "test_accuracy": 0.63}]
    for name, rows in (("fp8", lines), ("compare_twelve", bf16)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert study_tables.fp8().splitlines()[2:4] == [
        "| none (bf16) | 10.0% | 20.0% | 0 | - | - | - |",
        "| `x`, `W` and `gy` to e4m3, one scale per row | 10.0% | 20.0% | 2 | 57.0 | 55.0 | -2.0 ± 1.0 |",
    ]
