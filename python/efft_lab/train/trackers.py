"""Experiment trackers of accelerate (TensorBoard, W&B, ...), which get what metrics.jsonl gets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from efft_lab import typed
from efft_lab.train.checkpoint import flat
from efft_lab.train.config import TrainConfig

PROJECT = "efft"


def check_trackers(trackers: Sequence[Any]) -> None:
    """Refuses trackers that accelerate would leave out without a word.

    Args:
        trackers: names, or objects derived from accelerate's `GeneralTracker`.

    Raises:
        ValueError: a name that accelerate does not know.
        ImportError: the package of a tracker is not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    names = [tracker for tracker in trackers if isinstance(tracker, str)]
    known = [str(getattr(name, "value", name)) for name in LOGGER_TYPE_TO_CLASS]
    typed.check_names("log_with", names, known, "tracker")
    available = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    missing = [name.replace("_", "-") for name in names if name not in available]
    if missing:
        raise ImportError(f"logging with {', '.join(missing)} needs its package: pip install {' '.join(missing)}")


def start(accelerator: Any, folder: Path, config: TrainConfig, update: int) -> None:
    """Begins the trackers of a run with its configuration.

    Args:
        accelerator: made by `efft_lab.train.build.make_accelerator`.
        folder: for their files; W&B shows the name of the folder around it.
        config: the run.
        update: where a resumed run goes on; TensorBoard forgets what came after.
    """
    if not accelerator.log_with:
        return
    folder.mkdir(exist_ok=True)
    values = {
        name: value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in flat(config.to_dict()).items()
    }
    wandb = {"name": folder.resolve().parent.name, "dir": str(folder)}
    options = {"wandb": wandb, "tensorboard": {"purge_step": update + 1 if update else None}}
    accelerator.init_trackers(PROJECT, values, options)
