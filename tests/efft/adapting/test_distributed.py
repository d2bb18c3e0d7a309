"""Test that two processes train like one process with the complete batch, with DDP, accelerate and FSDP2.

The processes communicate through gloo on the CPU. One case has a quantized base. Models that FSDP2 shards must save the
same adapter files as other models, and must refuse the operations that need the complete model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import efft

pytest.importorskip("timm", reason="needs timm: pip install 'efft-kernels[vision]'")
pytest.importorskip("accelerate", reason="needs accelerate: pip install 'efft-kernels[train]'")

from tests.efft.adapting import distributed_run as run

pytestmark = pytest.mark.slow  # starts several processes

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the results of all ways. One call of torchrun creates them with two processes."""
    folder = tmp_path_factory.mktemp("distributed")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", run.__file__]
    done = subprocess.run(
        [*command, str(folder), *run.WAYS], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def results(folder: Path, way: str, checkpointing: bool) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{way}{rank}.pt")[checkpointing] for rank in (0, 1)]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("way", run.WAYS)
def test_two_processes_train_as_one(
    way: str, checkpointing: bool, folder: Path, show: Callable[[str, str, str, object], None]
) -> None:
    make, _ = run.WAYS[way]
    expected = run.plain(make(0, checkpointing), *run.batch())
    for result in results(folder, way, checkpointing):
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert result["trained"].keys() == expected["trained"].keys()
        worst = {n: (t - expected["trained"][n]).abs().max().item() for n, t in result["trained"].items()}
        assert max(worst.values()) < 1e-5, worst  # three steps of Adam change an entry by 3e-2
        row, of_losses = (
            f"{way}{', checkpointing' * checkpointing}",
            zip(result["losses"], expected["losses"], strict=True),
        )
        show("Two processes, largest difference from one", row, "of a loss", max(abs(a - b) for a, b in of_losses))
        show("Two processes, largest difference from one", row, "of a trained entry", max(worst.values()))


def test_ddp_sends_gradients_of_factors_and_head_once_a_step(folder: Path) -> None:
    """Each step has two backward passes, the first under no_sync, so each trained tensor is sent once, in fp32."""
    count = efft.count_parameters(run.adapted(0, False))
    for checkpointing in (False, True):
        for result in results(folder, "ddp", checkpointing):
            assert result["sent"] == [4 * (count.factors + count.head + count.extras)] * run.STEPS


def test_a_sharded_model_saves_the_same_files(folder: Path, tmp_path: Path) -> None:
    efft.save_adapter(run.adapted(0, False), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {path.name for path in (folder / "saved").iterdir()} == names
    for name in names:
        assert (folder / "saved" / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_what_a_sharded_model_refuses(folder: Path) -> None:
    refused = json.loads((folder / "refused.json").read_text())
    for name in ("apply", "remove", "merge", "merged_state_dict"):
        message = f"is sharded by fully_shard, which refers to its layers: call efft.{name} before fully_shard"
        assert message in refused[name]
    assert "shard the whole adapted model instead of the factors alone" in refused["alone"]
