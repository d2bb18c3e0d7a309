"""Test the study that measures how much of the updates of full fine-tuning can be expressed by shared factors.

The tests apply the measures to matrices for which the results are known, and check the table of the results.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from benchmarks import study_tables, tables
from efft_lab import record
from efft_lab.studies import subspaces

GENERATOR = torch.Generator().manual_seed(0)


def orthonormal(*size: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(*size, dtype=torch.float64, generator=GENERATOR))[0]


def test_what_one_pair_of_bases_holds_is_all_shared() -> None:
    cores = torch.randn(6, 4, 4, dtype=torch.float64, generator=GENERATOR)
    each = orthonormal(30, 4) @ cores @ orthonormal(40, 4).T
    assert subspaces.shared_energy(each, 4) == pytest.approx(1)
    assert subspaces.shared_energy(each, 3) < 0.999


def test_directions_drawn_anew_share_little_and_keep_the_singular_values() -> None:
    each = orthonormal(50, 4) @ torch.randn(6, 4, 4, dtype=torch.float64, generator=GENERATOR) @ orthonormal(60, 4).T
    values = torch.linalg.svdvals(each)
    other = subspaces.independent(each, values, GENERATOR)
    torch.testing.assert_close(torch.linalg.svdvals(other), values)
    assert subspaces.shared_energy(other, 4) < 0.5


def test_effective_rank_and_own_energy_of_equal_singular_values() -> None:
    values = torch.zeros(3, 20, dtype=torch.float64)
    values[:, :5] = 2.0
    assert subspaces.effective_rank(values) == pytest.approx(5)
    assert subspaces.own_energy(values, 2) == pytest.approx(2 / 5)


def test_matrices_of_a_model_are_those_of_its_layers() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=2, num_classes=0)
    found = subspaces.matrices(model.state_dict())
    x = torch.randn(5, 24, dtype=torch.float64, generator=GENERATOR)
    block = model.blocks[1].double()
    q, k, v = (x @ found[name][1] for name in "qkv")
    torch.testing.assert_close(torch.cat([q, k, v], -1) + block.attn.qkv.bias, block.attn.qkv(x))
    torch.testing.assert_close(x @ found["o"][1] + block.attn.proj.bias, block.attn.proj(x))
    hidden = x @ found["fc1"][1]
    torch.testing.assert_close(hidden + block.mlp.fc1.bias, block.mlp.fc1(x))
    torch.testing.assert_close(hidden @ found["fc2"][1].T + block.mlp.fc2.bias, block.mlp.fc2(hidden))


def test_table_of_means_over_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert study_tables.subspaces() == tables.NOTHING
    facts = {"machine": "Test CPU", "versions": {}, "commit": "abc1234", "command": "x", "date": "2026-01-02"}
    measured = {"effective_rank": 100.0, "own": 0.5, "shared": 0.25, "independent": 0.125}
    line = {"of": "update", "set": "q", "seed": 0, "rank": 16, **measured, **facts}
    lines = [{**line, "task": "count"}, {**line, "task": "cifar10", "shared": 0.35, "effective_rank": 51.0}]
    (tmp_path / "subspaces.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    shown = study_tables.subspaces().splitlines()
    assert shown[2] == "| update | q | 76 | 50.0% | 30.0% | 12.5% |"
    assert shown[-1].startswith("- count, cifar10: `x`, commit abc1234")
