"""Test that a killed run resumes with exactly the same results, wherever it was killed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from efft import EfftConfig
from efft_lab.train import CheckpointError, TrainConfig, read_metrics, run
from efft_lab.train.build import EpochBatches


class Killed(BaseException):
    """Represent the end of the process; no code may catch this exception."""


def records(folder: Path) -> list[dict[str, Any]]:
    times = ("seconds", "images_per_second")
    return [
        {name: value for name, value in record.items() if name not in times}
        for record in read_metrics(folder / "metrics.jsonl")
    ]


def kill_after(monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    """End the run just before a write to metrics.jsonl, after ``writes`` earlier writes."""
    from efft_lab.train.folder import MetricsLog

    write, done = MetricsLog.write, []

    def limited(self: MetricsLog, **record: Any) -> None:
        if len(done) == writes:
            raise Killed
        done.append(record)
        write(self, **record)

    monkeypatch.setattr(MetricsLog, "write", limited)


# A run writes four step records and one epoch record in each of its four epochs. With pruning, it writes one more
# record after the second epoch.
PRUNED = {"prune_at": 2, "prune_keep": 0.7}


@pytest.mark.parametrize(
    ("writes", "changed"),
    [(writes, {"checkpoint_every": 1}) for writes in (0, 1, 4, 5, 19)]
    + [(writes, {"checkpoint_every": 3}) for writes in (3, 9, 13)]
    + [(writes, {"checkpoint_every": None}) for writes in (5, 13)]
    + [(writes, {"checkpoint_every": 1, **PRUNED}) for writes in (10, 11, 13)]
    + [(11, {"checkpoint_every": None, "schedule_per": "epoch", **PRUNED})],
    ids=str,
)
def test_resumed_run_equals_unbroken_run(
    writes: int, changed: dict[str, Any], config: TrainConfig, task: Any,
    make_model: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = replace(config, **changed)
    expected, broken = make_model(), tmp_path / "broken"
    result = run(config, tmp_path / "unbroken", model=expected, task=task).summary

    with monkeypatch.context() as patch:
        kill_after(patch, writes)
        with pytest.raises(Killed):
            run(config, broken, model=make_model(), task=task)
    torch.manual_seed(1234)  # the random state of the new process must not matter
    model = make_model()
    resumed = run(config, broken, model=model, task=task, resume=True).summary

    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert records(broken) == records(tmp_path / "unbroken")
    for name in ("test_accuracy", "val_accuracy", "best_epoch", "updates"):
        assert resumed[name] == result[name]


def test_consumed_batches_are_not_read_again(
    config: TrainConfig, task: Any, make_model: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    data = task.train

    class Spy(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(data)

        def __getitem__(self, index: int) -> Any:
            read.append(index)
            return data[index]

    task.train = Spy()
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(Killed):
            run(replace(config, epochs=1), tmp_path, model=make_model(), task=task)
    read.clear()
    run(replace(config, epochs=1), tmp_path, model=make_model(), task=task, resume=True)
    # The run is killed in the fourth of four batches, so the checkpoint after the third batch is the last one.
    assert len(read) == 16
    order = list(EpochBatches(64, 16, config.seed))
    assert read == order[3]


def test_folder_with_a_run_needs_a_decision(
    config: TrainConfig, task: Any, make_model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    first = run(config, tmp_path, model=make_model(), task=task).summary
    with pytest.raises(FileExistsError, match=r"holds a finished run; .*--resume.*--overwrite"):
        run(config, tmp_path, model=make_model(), task=task)
    with pytest.raises(ValueError, match=r"either resume .* or overwrite"):
        run(config, tmp_path, resume=True, overwrite=True)
    assert run(config, tmp_path, resume=True).summary == first  # a finished run is neither trained nor tested again
    other = run(replace(config, method="linear"), tmp_path, model=make_model(), task=task, overwrite=True).summary
    assert other["saved"] == "head.safetensors"
    assert not (tmp_path / "adapter").exists()


def test_unfinished_run_is_named(
    config: TrainConfig, task: Any, make_model: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_after(patch, 7)
        with pytest.raises(Killed):
            run(config, tmp_path, model=make_model(), task=task)
    with pytest.raises(FileExistsError, match="holds an unfinished run"):
        run(config, tmp_path, model=make_model(), task=task)


@pytest.fixture
def stopped(
    config: TrainConfig, task: Any, make_model: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Return the folder of a run that was killed in its second epoch."""
    with monkeypatch.context() as patch:
        kill_after(patch, 7)
        with pytest.raises(Killed):
            run(config, tmp_path, model=make_model(), task=task)
    return tmp_path


def test_other_configuration_is_refused(stopped: Path, config: TrainConfig) -> None:
    other = replace(config, lr=0.5, efft=EfftConfig(rank=8, scale=10.0, dropout=0.1))
    with pytest.raises(CheckpointError) as caught:
        run(other, stopped, resume=True)
    assert str(caught.value) == ("cannot resume with another configuration: efft.rank was 4, is 8; lr was 0.01, is 0.5")


def test_checkpoint_interval_may_change(
    stopped: Path, config: TrainConfig, task: Any, make_model: Callable[[], nn.Module]
) -> None:
    result = run(replace(config, checkpoint_every=None), stopped, model=make_model(), task=task, resume=True).summary
    assert result["updates"] == 16


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign"])
def test_damaged_checkpoint(stopped: Path, config: TrainConfig, damage: str) -> None:
    path = stopped / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        del content[len(content) // 2 :]
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
    elif damage == "empty":
        content.clear()
    path.write_bytes(content)
    if damage == "foreign":
        torch.save({"epoch": 1}, path)
        with pytest.raises(CheckpointError, match="has format None; this version reads 2"):
            run(config, stopped, resume=True)
    else:
        with pytest.raises(
            CheckpointError, match=r"checkpoint .* is damaged \(.*\); start the run again with overwrite"
        ):
            run(config, stopped, resume=True)


def test_shortened_metrics_file_is_refused(
    stopped: Path, config: TrainConfig, task: Any, make_model: Callable[[], nn.Module]
) -> None:
    (stopped / "metrics.jsonl").write_text("")
    with pytest.raises(
        CheckpointError, match=r"metrics.jsonl has 0 bytes, but had \d+ when its checkpoint was written"
    ):
        run(config, stopped, model=make_model(), task=task, resume=True)


def test_other_number_of_processes_is_refused(
    stopped: Path, config: TrainConfig, task: Any, make_model: Callable[[], nn.Module]
) -> None:
    state = torch.load(stopped / "checkpoint.pt", weights_only=True)
    torch.save({**state, "processes": state["processes"] * 2}, stopped / "checkpoint.pt")
    with pytest.raises(
        CheckpointError, match="started with 2 processes and must be resumed with the same number, not 1"
    ):
        run(config, stopped, model=make_model(), task=task, resume=True)


def test_checkpoint_is_never_written_in_place(stopped: Path) -> None:
    assert not list(stopped.glob(".*.tmp"))
    state = torch.load(stopped / "checkpoint.pt", weights_only=True)
    assert json.dumps(state["config"])
    assert not any(name.startswith("blocks") for name in state["weights"])  # the frozen backbone is not saved


@pytest.mark.gpu
def test_loss_scale_is_resumed(
    config: TrainConfig, task: Any, make_model: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    config = replace(config, amp="fp16")
    run(config, tmp_path / "unbroken", model=make_model(), task=task)
    with monkeypatch.context() as patch:
        kill_after(patch, 7)
        with pytest.raises(Killed):
            run(config, tmp_path / "broken", model=make_model(), task=task)
    state = torch.load(tmp_path / "broken" / "checkpoint.pt", weights_only=True)
    assert state["scaler"]["scale"] >= 1
    assert state["scaler"]["_growth_tracker"] == state["update"]
    run(config, tmp_path / "broken", model=make_model(), task=task, resume=True)
    losses = [[r["loss"] for r in records(tmp_path / name)] for name in ("broken", "unbroken")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
