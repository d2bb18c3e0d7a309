"""Compare the model in benchmarks/steps.py with recorded medians and with counts by hand.

The model predicts the times of the cuda backend for the four linear layers of a ViT-B block, forward and backward. A
step is a planned change to the backend.
"""

from __future__ import annotations

import pytest

from benchmarks import steps_mlp, steps_page
from benchmarks.steps import (
    LAYERS,
    PASSES,
    SECOND_GENERATION,
    STEPS,
    THIRD_GENERATION,
    Sizes,
    by_gpu,
    counts,
    error,
    fit,
    launches,
    predict,
)
from benchmarks.steps_mlp import launches as mlp
from efft_lab import record

TOKENS = 64 * 197


@pytest.mark.parametrize("gpu", ["H100", "H200"])
def test_it_reproduces_the_measured_block(gpu: str) -> None:
    """Check that the modeled time of the block is within 3 % of every run, and each of its 8 parts within 10 %.

    The parts are the forward and the backward passes of the four layers.
    """
    runs = by_gpu()[gpu]
    by = fit(runs)
    assert error(by, runs) < 2.5
    for run in runs:
        modeled = predict(by, run.floor)
        assert sum(modeled.values()) == pytest.approx(sum(run.ours.values()), rel=0.03)
        assert sum(modeled.values()) / sum(run.floor.values()) == pytest.approx(run.ratio, rel=0.03)
        assert modeled == pytest.approx(run.ours, rel=0.1)


def test_the_measured_ratio_is_the_known_one() -> None:
    assert by_gpu()["H100"][0].ratio == pytest.approx(1.55, abs=0.005)


def test_a_fit_without_a_layer_predicts_that_layer() -> None:
    """Check that the constants describe the GPU, and not only the medians to which they are fitted."""
    run = by_gpu()["H100"][0]
    for layer in ("qkv", "fc1", "fc2"):  # not "o": without this small layer, the fit cannot determine the launch time
        kept = {key: time for key, time in run.floor.items() if key[0] != layer}
        part = run._replace(floor=kept)
        left_out = {key: time for key, time in run.floor.items() if key[0] == layer}
        modeled = predict(fit([part]), left_out)
        assert sum(modeled.values()) == pytest.approx(sum(run.ours[key] for key in left_out), rel=0.03)


def test_the_fitted_bandwidth_is_near_that_of_a_copy() -> None:
    for runs in by_gpu().values():
        assert fit(runs).bandwidth == pytest.approx(runs[0].copy, rel=0.1)


def test_launches_of_a_block() -> None:
    """Check that a separate kernel ("project") computes h or dh if the output has more than 2048 columns."""
    found = {
        (layer, way): [one.kernel for one in launches(Sizes(TOKENS, *sizes, 32), way)]
        for layer, sizes in LAYERS.items()
        for way in PASSES
    }
    made = ["pack", "lowrank_gemm_sm90"]
    separate = ["pack", "project", "lowrank_gemm_sm90"]
    sums = ["reduce_tokens", "finish"]
    assert found == {
        ("qkv", "fwd"): separate,
        ("qkv", "bwd"): made + sums,
        ("o", "fwd"): made,
        ("o", "bwd"): made + sums,
        ("fc1", "fwd"): separate,
        ("fc1", "bwd"): made + sums,
        ("fc2", "fwd"): made,
        ("fc2", "bwd"): separate + sums,
    }
    assert counts("")[0] == 27


def test_bytes_of_one_call_by_hand() -> None:
    pack, project, product = launches(Sizes(1000, 768, 3072, 16), "fwd")
    assert pack.bytes == 16 * (768 + 3072) * (4 + 2)
    assert project.bytes == 2 * (1000 * 768 + 16 * 768 + 1000 * 16)
    assert product.bytes == 2 * (1000 * 768 + 768 * 3072 + 1000 * 16 + 16 * 3072 + 3072 + 1000 * 3072)
    assert product.depth == pytest.approx((768 + 64) / 768)
    (_, _, shorter) = launches(Sizes(1000, 768, 3072, 16), "fwd", "A")
    assert shorter.depth == pytest.approx((768 + 16) / 768)


def test_no_step_makes_the_block_slower() -> None:
    run = by_gpu()["H100"][0]
    by = fit([run])
    times = [sum(predict(by, run.floor, "".join(STEPS)[:n]).values()) for n in range(len(STEPS) + 1)]
    assert times == sorted(times, reverse=True)
    assert all(sum(predict(by, run.floor, step).values()) < times[0] for step in STEPS)
    assert times[-1] > sum(run.floor.values())


def test_launches_of_an_mlp_by_hand() -> None:
    """Check the kernels of each form of the MLP, and the bytes of those that change with the form."""

    def kernels(form: str, direction: str, changes: str) -> list[str]:
        return [part.launch.kernel for part in mlp(1000, 768, 3072, 16, form, direction, changes)]

    product = "lowrank_gemm_sm90"
    assert kernels("mlp", "fwd", SECOND_GENERATION) == ["norm", product, "gelu", product]
    assert kernels("mlp", "fwd", THIRD_GENERATION) == ["norm", product, product]
    assert kernels("fused", "fwd", THIRD_GENERATION) == ["norm", product, "gelu", product]
    sums = "reduce_tokens"
    assert kernels("mlp", "bwd", SECOND_GENERATION) == [product, "gelu_backward", product, "norm_backward", sums]
    assert kernels("mlp", "bwd", THIRD_GENERATION) == [product, product, "norm_backward", sums]
    assert kernels("fused", "bwd", THIRD_GENERATION) == [product, sums, product, "norm_backward", sums]
    wide = 2 * 1000 * 3072
    for direction, at, extra in (("fwd", 1, 1), ("bwd", 0, 2)):
        plain, with_gelu = (
            mlp(1000, 768, 3072, 16, form, direction, THIRD_GENERATION)[at] for form in ("layers", "mlp")
        )
        assert with_gelu.launch.bytes == plain.launch.bytes + extra * wide
        assert (plain.has_gelu, with_gelu.has_gelu) == (False, True)


@pytest.mark.parametrize("gpu", ["H100", "H200"])
def test_each_generation_makes_the_mlp_faster(gpu: str) -> None:
    runs = by_gpu()[gpu]
    by, run = fit(runs), runs[-1]
    times = [steps_mlp.predict(by, run, "mlp", changes) for changes in ("", SECOND_GENERATION, THIRD_GENERATION)]
    assert times == sorted(times, reverse=True)
    # The baseline contains torch's GELU, whose bytes the third generation does not move.
    linear = sum(run.floor[layer, way] for layer in ("fc1", "fc2") for way in PASSES)
    assert steps_mlp.baseline(by, run) - linear > 2 * 2 * TOKENS * 3072 / by.bandwidth / 1e6
    assert linear < times[-1] < times[0]


@pytest.mark.parametrize("gpu", ["H100", "H200"])
def test_the_block_is_the_mlp_with_qkv_and_o(gpu: str) -> None:
    """The ratio of the block must lie between those of its halves, and equal the sum of their times by hand."""
    runs = by_gpu()[gpu]
    by, run = fit(runs), runs[-1]
    narrow, statistics = 2 * TOKENS * 768, 8 * TOKENS + 4 * 768
    for form, bytes_of_norm in (("layers", 5 * narrow), ("mlp", 6 * narrow)):
        norm, of_torch = (
            2 * by.launch + (n + 2 * statistics) / by.bandwidth / 1e6 for n in (bytes_of_norm, 5 * narrow)
        )
        linear = sum(time for (layer, _), time in predict(by, run.floor, "AB").items() if layer in ("qkv", "o"))
        floor = sum(time for (layer, _), time in run.floor.items() if layer in ("qkv", "o")) + of_torch
        mlp_time, mlp_floor = steps_mlp.predict(by, run, form, "AB"), steps_mlp.baseline(by, run)
        ratio = steps_mlp.ratio_of_block(by, run, form, "AB")
        assert ratio == pytest.approx((linear + norm + mlp_time) / (floor + mlp_floor), rel=1e-9)
        assert min((linear + norm) / floor, mlp_time / mlp_floor) < ratio
        assert ratio < max((linear + norm) / floor, mlp_time / mlp_floor)


def test_the_committed_page_is_current() -> None:
    assert (record.RESULTS / "steps.md").read_text() == steps_page.render(), "run: python -m benchmarks steps --write"
