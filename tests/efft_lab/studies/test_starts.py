"""Test the study that initializes the factors of EFFT2 with directions of gradients, of weights, or at random.

Such an initialization ("start") must not change the outputs of the model. The factors must hold the requested
directions. The first step must move the weights by the distance for which the scale was computed.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import study_tables, tables
from efft_kernels import TTFactors
from efft_kernels.nn.initialization import MOVEMENT
from efft_lab import record
from efft_lab.studies import starts, subspaces
from efft_lab.train import TrainConfig, run

for package in ("accelerate", "timm", "sklearn"):
    pytest.importorskip(package, reason="needs the dev extra")

RECIPE: dict[str, Any] = {
    **{"model": "test_vit", "pretrained": False, "image_size": 32, "max_test": 60, "data": "digits"},
    **{"epochs": 1, "batch_size": 100, "schedule_per": "update", "drop_path": 0.0, "warmup": 0.0, "lr": 1e-2},
    "efft": {"dropout": 0.0},
}


def bases(d_in: int, d_out: int, rank: int) -> tuple[Tensor, Tensor]:
    left, right = (torch.linalg.qr(torch.randn(d, rank, dtype=torch.float64))[0] for d in (d_in, d_out))
    return left, right


@pytest.mark.parametrize(("kind", "init"), [*product(starts.KINDS, "uv")])
def test_directions_at_the_norm_of_random_ones_and_no_update(kind: str, init: str) -> None:
    torch.manual_seed(0)
    factors = TTFactors(60, 90, 6, n_layers=2, n_cores=3, init=init)
    of = bases(60, 90, 6)
    starts.start(factors, kind, of)
    assert not (factors.U @ factors.C @ factors.V).any()
    held = {"side": {"u": [factors.V], "v": [factors.U]}[init], "cores": [factors.U, factors.V]}[kind]
    for side in (each.detach() for each in held):
        basis = (of[0] if len(side) == 60 else of[1].T).float()
        torch.testing.assert_close(side / side.norm(), basis / basis.norm())
        d = max(side.shape)
        assert side.norm().item() == pytest.approx(
            (2 / (d + 6) * d * 6) ** 0.5, rel=0.1
        )  # the norm for Xavier's values
    assert (factors.C.any() and factors.initial_scale == 1) or kind == "cores"


@pytest.mark.parametrize("directed", [False, True])
def test_zero_cores_move_as_far_as_the_computed_scale_lets_them(directed: bool) -> None:
    torch.manual_seed(0)
    factors = TTFactors(200, 300, 8, n_layers=4, n_cores=4)
    starts.start(factors, "cores", bases(200, 300, 8) if directed else None)
    signs = torch.randn(factors.C.shape).sign()
    moved = factors.initial_scale * factors.U @ signs @ factors.V
    assert moved.square().mean().sqrt().item() == pytest.approx(MOVEMENT, rel=0.05)


def test_bases_are_those_of_the_trains() -> None:
    left, right = bases(30, 30, 3)
    up = torch.linalg.qr(torch.randn(60, 3, dtype=torch.float64))[0]
    found = {kind: left @ torch.randn(2, 3, 3, dtype=torch.float64) @ right.T for kind in "qkvo"}
    found |= {kind: left @ torch.randn(2, 3, 3, dtype=torch.float64) @ up.T for kind in ("fc1", "fc2")}
    of = starts.bases_of(found, 3)
    for name, (d_in, d_out) in {"mhsa": (left, right), "ffn": (left, up)}.items():
        for basis, expected in zip(of[name], (d_in, d_out), strict=True):
            torch.testing.assert_close(basis @ basis.T, expected @ expected.T)


@pytest.mark.slow
def test_study_of_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def recipe(task: str, seed: int) -> dict[str, Any]:
        return {**RECIPE, "seed": seed, "data_seed": seed, "protocol": "final"}

    monkeypatch.setattr(subspaces, "recipe", recipe)
    monkeypatch.setattr(starts, "recipe", recipe)
    monkeypatch.setenv("EFFT_HOME", str(tmp_path / "home"))
    assert starts.main(["--tasks", "digits", "--seeds", "1", "--results", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    of = {(row["kind"], row["source"]): row["test_accuracy"] for row in rows}
    assert set(of) == {*product(starts.KINDS, starts.SOURCES)}
    assert len(set(of.values())) > 1
    efft = {"rank": starts.RANK, "scale": "auto", "dropout": 0.0}
    plain = TrainConfig.from_dict({**recipe("digits", 1), "method": "efft", "efft": efft})
    assert run(plain, tmp_path / "plain", progress=False).summary["test_accuracy"] == of["side", "random"]


def test_table_of_means_over_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert study_tables.starts() == tables.NOTHING
    facts = {"machine": "Test CPU", "versions": {}, "commit": "abc1234", "command": "x", "date": "2026-01-02"}
    line = {"kind": "side", "source": "random", "rank": 16, "task": "count", **facts}
    lines = [
        {**line, "seed": 0, "test_accuracy": 0.5},
        {**line, "seed": 1, "test_accuracy": 0.6},
        {**line, "seed": 0, "test_accuracy": 0.75, "task": "cifar10"},
        {**line, "seed": 0, "test_accuracy": 0.7, "kind": "cores", "source": "weights"},
    ]
    (tmp_path / "starts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    assert study_tables.starts().splitlines()[2:4] == [
        "| one side, random cores | random | 55.0 | 75.0 | 65.0 |",
        "| both sides, zero cores | weights | 70.0 | - | - |",
    ]
