"""Test the analytical model of the time that a GPU needs for the adapted layers of a ViT block, forward and backward.

A design is one way to compute an adapted layer with a sequence of kernels. The design "floor" is the frozen baseline.

The tests compare the modeled times with the results of an independent script and with measurements. They also check
properties that every such model must have.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from benchmarks.__main__ import main as benchmarks_main
from benchmarks.model_roofline import DESIGNS, Case, Layer, block_times, main, microseconds, vit_block
from benchmarks.roofline_gpu import Machine

TOKENS = 64 * 197
#: The constants of the GPU in the independent script, which was written before there were measurements.
ASSUMED = Machine(bandwidth=4.3e12, fixed=2.0, own=0.95)

#: For each design, the time of a ViT-B block divided by that of the frozen baseline, at ranks 16, 32 and 64. The
#: numbers come from an independent script.
BLOCK = {
    "floor": (1.00, 1.00, 1.00),
    "paper": (3.73, 3.73, 3.73),
    "naive": (1.72, 1.72, 1.72),
    "peft": (2.42, 2.43, 2.50),
    "chain-compiled": (2.06, 2.07, 2.14),
    "addmm": (1.90, 1.91, 1.97),
    "efft:eager": (1.68, 1.69, 1.73),
    "augmented-dx": (1.62, 1.62, 1.65),
    "lorafusion": (1.45, 1.51, 1.64),
    "augmented": (1.31, 1.32, 1.37),
    "augmented-alone": (1.62, 1.62, 1.65),
    "recompute": (1.32, 1.40, 1.67),
    "one-pass": (1.32, 1.39, 1.54),
    "efft:triton": (1.43, 1.45, 1.51),
    "fused:triton": (1.37, 1.40, 1.47),
    "merged": (1.27, 1.28, 1.31),
    "own-forward": (1.30, 1.32, 1.37),
    "best": (1.26, 1.28, 1.34),
    "neighbors": (1.18, 1.21, 1.28),
    "ideal": (1.04, 1.08, 1.16),
}
#: The microseconds of the layers qkv, o, fc1 and fc2 at rank 16, from the same script.
LAYERS = {
    "floor": (123.7, 45.4, 162.8, 162.8),
    "paper": (560.3, 185.3, 575.4, 521.9),
    "naive": (212.1, 92.2, 272.8, 273.3),
    "lorafusion": (177.7, 81.0, 226.1, 232.9),
    "neighbors": (153.2, 65.3, 182.4, 181.9),
}


def test_ratios_of_the_block() -> None:
    times = [block_times(ASSUMED, TOKENS, rank, vit_block(768)) for rank in (16, 32, 64)]
    found = {name: tuple(of[name]["block"] / of["floor"]["block"] for of in times) for name in DESIGNS}
    assert found.keys() == BLOCK.keys() | {"efft:cuda"}  # the script does not have our cuda backend
    for name, expected in BLOCK.items():
        assert found[name] == pytest.approx(expected, abs=0.0051), name


def test_what_stands_in_front_of_the_layers() -> None:
    """Check the time of the two norms and the GELU that precede layers of the block.

    A norm or GELU moves 5 times the bytes of its input. If the epilogue of a product multiplies by the slope of the
    GELU, the GELU moves only 3 times the bytes of its input.
    """
    machine = Machine(bandwidth=1e12, fixed=0.0)
    times = block_times(machine, 1000, 16, vit_block(100))
    norms, gelu = 2 * 5 * 2 * 1000 * 100 / 1e6, 2 * 1000 * 400 / 1e6
    for name, expected in (
        ("floor", norms + 5 * gelu),
        ("efft:triton", norms + 5 * gelu),
        ("fused:triton", norms + 3 * gelu),
    ):
        assert times[name]["with norms and GELU"] - times[name]["block"] == pytest.approx(expected), name


def test_microseconds_by_layer() -> None:
    times = block_times(ASSUMED, TOKENS, 16, vit_block(768))
    for name, expected in LAYERS.items():
        assert [times[name][layer] for layer in ("qkv", "o", "fc1", "fc2")] == pytest.approx(expected, abs=0.051), name


@pytest.mark.parametrize(
    ("machine", "best", "neighbors"),
    [
        (replace(ASSUMED, fixed=0.0), 1.23, 1.15),
        (replace(ASSUMED, fixed=4.0), 1.29, 1.20),
        (replace(ASSUMED, fixed=0.0, tiled=False), 1.20, 1.12),
        (replace(ASSUMED, own=0.9), 1.27, None),
        (replace(ASSUMED, own=1.0), 1.24, None),
    ],
    ids=str,
)
def test_assumptions_move_the_block_as_they_did(machine: Machine, best: float, neighbors: float | None) -> None:
    times = block_times(machine, TOKENS, 16, vit_block(768))
    assert times["best"]["block"] / times["floor"]["block"] == pytest.approx(best, abs=0.0051)
    if neighbors is not None:
        assert times["neighbors"]["block"] / times["floor"]["block"] == pytest.approx(neighbors, abs=0.0051)


@pytest.mark.parametrize(
    ("machine", "measured"),
    [(Machine(), 1.506), (Machine(bandwidth=3.13e12, fixed=2.96, own=1 / 1.119), 1.556)],
    ids=["H200", "H100"],  # 1.556 is the mean of two runs
)
def test_the_fitted_constants_reproduce_the_measured_block(machine: Machine, measured: float) -> None:
    times = block_times(machine, TOKENS, 32, vit_block(768))
    assert times["efft:cuda"]["block"] / times["floor"]["block"] == pytest.approx(measured, rel=0.03)


def test_calibrated_at_the_square_product() -> None:
    machine = Machine()
    assert machine.product(8192, 8192, 8192) - machine.fixed == pytest.approx(2e6 * 8192**3 / machine.flops, rel=1e-3)


def test_a_memory_bound_kernel_takes_its_bytes() -> None:
    machine = Machine(bandwidth=1e12, fixed=2.0)
    assert machine.memory(1e9) == pytest.approx(1002.0)


def test_no_product_beats_the_roof() -> None:
    machine = Machine()
    for m, n, k in ((197, 768, 768), (1576, 2304, 768), (12608, 768, 3072), (768, 3072, 12608)):
        roof = 1e6 * max(2 * m * n * k / machine.flops, 2 * (m * k + k * n + m * n) / machine.bandwidth)
        assert machine.product(m, n, k) - machine.fixed >= 0.97 * roof  # the main loop runs slightly above "peak"


@pytest.mark.parametrize("rank", [16, 64])
def test_ideal_is_the_least_and_the_floor_below_it(rank: int) -> None:
    for layer in vit_block(768):
        case = Case(Machine(), layer, TOKENS, rank)
        times = {name: microseconds(design(case)) for name, design in DESIGNS.items()}
        assert all(math.isfinite(time) for time in times.values())
        assert times.pop("floor") < times.pop("ideal") <= min(times.values())


def test_more_rank_costs_no_less() -> None:
    for name, design in DESIGNS.items():
        times = [microseconds(design(Case(Machine(), Layer("fc1", 768, 3072), TOKENS, r))) for r in (8, 16, 32, 64)]
        assert times == sorted(times), name


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens and rank must be at least 1, got 0 and 16"):
        Case(Machine(), Layer("o", 768, 768), 0, 16)


def test_command_says_that_nothing_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--ranks", "16", "--fixed", "4"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Modeled, not measured: 12608 tokens, width 768, rank 16, bf16; 790 TFLOP/s")
    assert all(f"`{name}`" in out for name in DESIGNS)
    assert benchmarks_main(["--help"]) == 0
