"""One training run: adapt, train, select, test once, save. Killed at any moment, it resumes to the same bits."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from efft_lab.train import build, outputs, trackers
from efft_lab.train.config import TrainConfig
from efft_lab.train.loop import Trainer

if TYPE_CHECKING:
    from efft_lab.data import TaskData


@dataclass(frozen=True)
class RunResult:
    """What a run ended with.

    Attributes:
        summary: the content of ``result.json``: accuracies, parameters, sizes, seconds, versions, configuration.
        model: the trained model in evaluation mode, with the selected weights; None if the folder held a finished
            run, so that nothing was trained (`efft_lab.train.restore.load_trained` reads it from there).
    """

    summary: dict[str, Any]
    model: nn.Module | None


def run(
    config: TrainConfig,
    out: str | Path,
    *,
    model: nn.Module | None = None,
    task: "TaskData | None" = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    log_with: Sequence[Any] = (),
) -> RunResult:
    """Trains, tests once at the very end, and writes everything to a folder.

    The folder gets ``config.json``, ``metrics.jsonl`` (as it happens), ``checkpoint.pt``, ``result.json`` and the
    trained part: ``adapter/`` (methods with factors), ``head.safetensors`` (linear), ``model.safetensors`` (full) or
    ``trained.safetensors`` (a method to compare with).
    A resumed run ends with the same weights and metrics as an unbroken one, bit for bit on a CPU.
    Works under ``accelerate launch`` with several processes.

    Args:
        config: the run.
        out: the folder.
        model: a model to train in place of the configuration's, with classifier, not adapted; trained in place.
        task: data in place of the configuration's.
        resume: go on from the folder's checkpoint, if there is one.
        overwrite: forget what the folder holds.
        progress: show a bar.
        log_with: experiment trackers of accelerate that also get the numbers of ``metrics.jsonl``, by name
            ("tensorboard", "wandb", ...) or as objects derived from its `GeneralTracker`; those that write files do so
            in the folder's ``tracked``.

    Raises:
        FileExistsError: the folder holds a run, and neither `resume` nor `overwrite` is given.
        CheckpointError: the checkpoint is damaged or of another configuration.
        FloatingPointError: the loss is not finite.
        ImportError: what a tracker needs is not installed.
    """
    out = Path(out)
    accelerator = build.make_accelerator(config, log_with, out / outputs.TRACKED)
    with accelerator.main_process_first():
        held, finished = outputs.open_folder(out, config, resume, overwrite, accelerator.is_main_process)
    if held is not None and finished:
        accelerator.print(f"{out}: this run is finished")
        return RunResult(held, None)
    trainer = Trainer(config, out, accelerator, model, task, progress)
    try:
        if held is not None:
            trainer.restore(held)
            accelerator.print(f"{out}: going on after update {trainer.update} of {trainer.updates}")
        trackers.start(accelerator, out / outputs.TRACKED, config, trainer.update)
        while trainer.epoch < config.epochs:
            trainer.train_epoch()
        return RunResult(trainer.finish(), trainer.plain)
    finally:
        trainer.close()
