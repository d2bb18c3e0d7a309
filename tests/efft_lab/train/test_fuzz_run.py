"""Test that randomly changed files of a run are read, or rejected with the reader's documented error."""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from efft_lab.train import CheckpointError, TrainConfig, folder
from efft_lab.train.build import load_trained, make_accelerator
from efft_lab.train.methods import restore_trained_state, trained_state
from efft_lab.train.trainer import Trainer
from tests.hostile import altered, at_most, damaged, fuzz

pytestmark = pytest.mark.slow  # runs hundreds of generated examples


class Code:
    """An object whose pickle would write a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self.marker), "w")


@pytest.fixture
def state() -> dict[str, Any]:
    """Return a small version of a checkpoint's contents."""
    model = nn.Linear(4, 3)
    return {
        "config": TrainConfig().to_dict(),
        "epoch": 1,
        "weights": trained_state(model),
        "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
        "processes": [{"random": folder.random_state()}],
    }


@fuzz
@given(data=st.data())
def test_checkpoints(data: st.DataObject, state: dict[str, Any], tmp_path: Path) -> None:
    path, model = tmp_path / "checkpoint.pt", nn.Linear(4, 3)
    folder.save_checkpoint(path, state)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with at_most(100):
        try:
            found = folder.load_checkpoint(path)
        except CheckpointError as error:
            assert "start the run again" in str(error) or "this version reads" in str(error)  # noqa: PT017
        else:
            assert found["config"] == state["config"], "only bytes that no checksum covers may have changed"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.fixture
def trainer(
    config: TrainConfig, task: Any, make_model: Callable[[], nn.Module], tmp_path: Path
) -> Iterator[tuple[Trainer, dict[str, Any]]]:
    """Return a trainer after one epoch, and its checkpoint."""
    (tmp_path / "run").mkdir()
    config = replace(config, checkpoint_every=None)
    trainer = Trainer(config, tmp_path / "run", make_accelerator(config), make_model(), task, progress=False)
    trainer.train_epoch()
    yield trainer, folder.load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    trainer.close()


@fuzz
@given(data=st.data())
def test_values_in_checkpoints(data: st.DataObject, trainer: tuple[Trainer, dict[str, Any]]) -> None:
    """The files are well-formed and contain changed values."""
    running, state = trainer
    state = dict(state)
    for key in data.draw(st.lists(st.sampled_from(sorted(state)), min_size=1, max_size=3)):
        state[key] = data.draw(altered(state[key]))
    with at_most(100):
        try:
            running.restore(state)
        except CheckpointError as error:
            assert str(error)  # noqa: PT017


STATES: dict[str, dict[str, Any]] = {
    "empty": {},
    "shapes": {"weight": torch.ones(4, 3), "bias": torch.ones(3)},
    "more": {"weight": torch.ones(3, 4), "bias": torch.ones(3), "x": torch.ones(1)},
    "kind": {"weight": torch.ones(3, 4), "bias": 3},
}


@pytest.mark.parametrize("case", STATES)
def test_states_of_other_models_change_nothing(case: str) -> None:
    model = nn.Linear(4, 3)
    before = trained_state(model)
    with pytest.raises(ValueError, match=r"the saved state does not fit this Linear: expected .* for "):
        restore_trained_state(model, STATES[case])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("what", ["a bare pickle", "a pickle in an archive"])
def test_code_in_checkpoints_does_not_run(what: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    if what == "a bare pickle":
        path.write_bytes(pickle.dumps(Code(tmp_path / "ran")))
    else:
        torch.save({"format": 1, "config": Code(tmp_path / "ran")}, path)
    with pytest.raises(CheckpointError, match="is damaged"):
        folder.load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_checkpoints_that_would_grow_in_memory_are_refused(state: dict[str, Any], tmp_path: Path) -> None:
    folder.save_checkpoint(tmp_path / "whole.pt", {**state, "weights": {"weight": torch.zeros(100_000_000)}})
    path = tmp_path / "small.pt"
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as whole,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for member in whole.infolist():
            small.writestr(member.filename, whole.read(member))
    assert path.stat().st_size < 1_000_000
    with at_most(100), pytest.raises(CheckpointError, match="it is compressed"):
        folder.load_checkpoint(path)


@fuzz
@given(data=st.data())
def test_configurations(data: st.DataObject, tmp_path: Path) -> None:
    path, values = tmp_path / "config.json", TrainConfig(method="lora", adapter={"rank": 4}).to_dict()
    whole = json.dumps(data.draw(altered(values))).encode()
    path.write_bytes(data.draw(damaged(whole)) if data.draw(st.booleans()) else whole)
    with at_most(100), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = TrainConfig.load(path)
        except ValueError as error:
            assert str(error)  # noqa: PT017
        else:
            assert TrainConfig.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@fuzz
@given(data=st.data())
def test_results(data: st.DataObject, tmp_path: Path) -> None:
    whole = json.dumps({"config": TrainConfig().to_dict(), "saved": "adapter", "classes": 5}).encode()
    (tmp_path / folder.RESULT).write_bytes(data.draw(damaged(whole)))
    try:
        assert isinstance(folder.read_result(tmp_path)["config"], dict)
    except ValueError as error:
        assert "result.json" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"saved": "../../x"}, "result.json is damaged: it gives '../../x' as the name of the saved weights"),
        ({"saved": None}, "it gives None as the name of the saved weights"),
        ({"classes": 10**12}, "is damaged: expected a number of classes, got 1000000000000"),
        ({"classes": "5"}, "expected a number of classes, got '5'"),
        ({"config": {"epochs": "3"}}, "epochs must be an integer, got '3'"),
        ({"config": 3}, r"result\.json is damaged: it must hold a JSON object with the run's 'config'"),
    ],
    ids=str,
)
def test_results_that_nobody_wrote(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    result = {"config": TrainConfig().to_dict(), "saved": "adapter", "classes": 5, "own_model": False, **changes}
    (tmp_path / folder.RESULT).write_text(json.dumps(result))
    with pytest.raises(ValueError, match=message):
        load_trained(tmp_path)
    del result["saved"]
    (tmp_path / folder.RESULT).write_text(json.dumps(result))
    with pytest.raises(ValueError, match=r"result\.json is damaged: it (lacks saved|must hold)"):
        load_trained(tmp_path)
