"""One training run: adapt, train, select, test once, save. A run that is killed at any moment resumes to the same bits.

:func:`run` is the way in, :class:`Trainer` the state of a run and the loop that advances it. What lies in the folder of
a run is in :mod:`efft_lab.train.folder`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from efft.prune import prune, set_ranks
from efft_lab import typed
from efft_lab.train.build import EpochBatches, create_model, load_task, make_accelerator, make_scheduler
from efft_lab.train.config import TrainConfig
from efft_lab.train.folder import (
    CHECKPOINT,
    METRICS,
    TRACKED,
    CheckpointError,
    MetricsLog,
    load_random_state,
    open_folder,
    random_state,
    read_result,
    save_checkpoint,
    start_trackers,
    write_result,
)
from efft_lab.train.goals import make_goal, score_text
from efft_lab.train.methods import METHODS, restore_trained_state, trained_state

if TYPE_CHECKING:
    from efft_lab.data import TaskData


@dataclass(frozen=True)
class RunResult:
    """What a run ended with.

    Attributes:
        summary: the content of ``result.json``: accuracies, parameters, sizes, seconds, versions, configuration.
        model: the trained model in evaluation mode, with the selected weights; None if the folder held a finished
            run, so that nothing was trained (:func:`efft_lab.train.build.load_trained` reads it from there).
    """

    summary: dict[str, Any]
    model: nn.Module | None


def run(
    config: TrainConfig,
    out: str | Path,
    *,
    model: nn.Module | None = None,
    task: TaskData | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    log_with: Sequence[Any] = (),
) -> RunResult:
    """Trains, tests once at the very end, and writes everything to a folder.

    The folder gets ``config.json``, ``metrics.jsonl`` (line by line as the run goes), ``checkpoint.pt``,
    ``result.json`` and what was trained: ``adapter/`` for a method with factors, otherwise the file that the method
    names (:attr:`efft_lab.train.methods.Method.saved`).
    A resumed run ends with the same weights and metrics as an unbroken one, bit for bit on a CPU.
    Works under ``accelerate launch`` with several processes.

    Args:
        config: the run.
        out: the folder.
        model: a model to train instead of the configuration's, with a classifier and not adapted; it is changed in
            place.
        task: data to use instead of the configuration's.
        resume: continue from the folder's checkpoint, if there is one.
        overwrite: delete what the folder holds and start again.
        progress: show a progress bar.
        log_with: experiment trackers of accelerate that also get the numbers of ``metrics.jsonl``, by name
            ("tensorboard", "wandb", ...) or as objects derived from its ``GeneralTracker``; trackers that write files
            put them in the folder's ``tracked``.

    Raises:
        FileExistsError: the folder holds a run, and neither ``resume`` nor ``overwrite`` is given.
        CheckpointError: the checkpoint is damaged or belongs to another configuration.
        FloatingPointError: the loss is not finite.
        ImportError: a package that a tracker needs is not installed.
    """
    out = Path(out)
    accelerator = make_accelerator(config, log_with, out / TRACKED)
    with accelerator.main_process_first():
        held, finished = open_folder(out, config, resume, overwrite, accelerator.is_main_process)
    if held is not None and finished:
        accelerator.print(f"{out}: this run is finished")
        return RunResult(held, None)
    trainer = Trainer(config, out, accelerator, model, task, progress)
    try:
        if held is not None:
            trainer.restore(held)
            accelerator.print(f"{out}: going on after update {trainer.update} of {trainer.updates}")
        start_trackers(accelerator, out / TRACKED, config, trainer.update)
        while trainer.epoch < config.epochs:
            trainer.train_epoch()
        return RunResult(trainer.finish(), trainer.plain)
    finally:
        trainer.close()


class Trainer:
    """The state of a run and the loop that advances it.

    Args:
        config: the run.
        out: its folder.
        accelerator: from :func:`efft_lab.train.build.make_accelerator`.
        model: a model to train instead of the configuration's; None creates that one.
        task: data to use instead of the configuration's; None loads that.
        progress: show a progress bar.

    Attributes:
        epoch: number of finished epochs.
        batch: number of batches of the current epoch that were trained on.
        update: number of finished updates of the weights.
        plain: the model without Accelerate's wrappers.
        best: scores, epoch and weights of the best epoch so far by the validation split; None before the first.

    Raises:
        ValueError: ``prune_at`` with several processes.
    """

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        accelerator: Any,
        model: nn.Module | None,
        task: TaskData | None,
        progress: bool = True,
    ) -> None:
        from accelerate.utils import set_seed
        from tqdm.auto import tqdm

        if config.prune_at is not None and accelerator.num_processes > 1:
            raise ValueError(f"prune_at needs a single process, got {accelerator.num_processes}: train without it")
        self.config, self.out, self.accelerator = config, out, accelerator
        with accelerator.main_process_first():  # one process downloads, the others find it in the cache
            self.task = load_task(config) if task is None else task
            self.own_model = model is not None
            model = create_model(config, self.task.classes) if model is None else model
        self.goal = make_goal(config, self.task, model)
        set_seed(config.seed)
        self.plain = model.train()
        METHODS[config.method].apply(self.plain, config.settings())
        train = self.task.trainval if config.protocol == "final" else self.task.train
        self.batches = EpochBatches(len(train), config.batch_size, config.seed)
        # A generator of its own: making an iterator must not draw from the stream that dropout uses.
        loader: DataLoader[Any] = self.loader(train, batch_sampler=self.batches, generator=torch.Generator())
        optimizer, self.scheduler = self.make_optimizer()
        self.model, self.optimizer, self.train_loader = accelerator.prepare(self.plain, optimizer, loader)
        set_seed(config.seed, device_specific=True)  # processes must not share their dropout masks

        self.eval_loaders: dict[str, Any] = {}

        self.epoch = self.batch = self.update = 0
        self.lr = 0.0  # of the last update
        self.updates = config.epochs * len(self.batches)
        self.totals = torch.zeros(0)  # of the epoch: loss, images, and the statistics of the goal
        self.best: dict[str, Any] | None = None
        self.ranks: dict[str, tuple[int, int]] | None = None  # after pruning
        self.seconds, self.clock = 0.0, time.perf_counter()
        main = accelerator.is_main_process
        self.log = MetricsLog(out / METRICS if main else None, accelerator)
        hidden = not (main and progress)
        self.bar = tqdm(total=self.updates * config.batch_size, unit="img", disable=hidden, dynamic_ncols=True)

    def loader(self, data: Dataset[Any], **options: Any) -> DataLoader[Any]:
        workers = self.config.workers
        pin = self.accelerator.device.type == "cuda"
        return DataLoader(data, num_workers=workers, pin_memory=pin, persistent_workers=workers > 0, **options)

    def make_optimizer(self) -> tuple[torch.optim.AdamW, Any]:
        """A fresh optimizer for what is trainable now, and the schedule of the whole run."""
        config = self.config
        groups = METHODS[config.method].parameter_groups(self.plain, config.lr, config.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
        return optimizer, make_scheduler(optimizer, config, len(self.batches))

    def renew_optimizer(self) -> None:
        """Replaces the optimizer after pruning has replaced the factors; its moments start at zero."""
        optimizer, self.scheduler = self.make_optimizer()
        self.optimizer = self.accelerator.prepare(optimizer)

    def train_epoch(self) -> None:
        """Trains to the end of the current epoch, validates, and writes the epoch's record and a checkpoint."""
        config, started = self.config, self.elapsed()
        self.bar.set_description(f"epoch {self.epoch + 1}/{config.epochs}")
        self.batches.start(self.epoch, skip=self.batch)
        skipped = self.batch
        for images, labels in self.train_loader:
            self.step(images, labels)
            self.batch += 1
            due = config.checkpoint_every and self.update % config.checkpoint_every == 0
            if due and self.batch < len(self.batches):  # after the last batch comes the epoch's own checkpoint
                self.save()
        loss, scores = self.show()
        images_per_second = (self.batch - skipped) * config.batch_size / max(self.elapsed() - started, 1e-9)
        validation = self.evaluate(self.task.val, "validation") if config.protocol == "select" else None
        name = self.goal.score
        if validation is not None and (self.best is None or validation[name] > self.best["scores"][name]):
            weights = trained_state(self.plain)
            self.best = {"scores": validation, "epoch": self.epoch, "weights": weights}
        self.log.write(
            kind="epoch",
            epoch=self.epoch,
            update=self.update,
            loss=loss,
            **{f"train_{name}": score for name, score in scores.items()},
            **{f"val_{name}": (validation or {}).get(name) for name in scores},
            lr=self.lr,
            images_per_second=images_per_second,
            seconds=self.elapsed(),
        )
        self.scheduler.step(self.epoch)
        self.epoch, self.batch = self.epoch + 1, 0
        self.totals = torch.zeros(0)
        if self.epoch == config.prune_at:
            self.prune()
        self.save()

    def prune(self) -> None:
        """Cuts the ranks. The best epoch so far is discarded, because its weights have other ranks."""
        report = prune(self.plain, self.config.prune_keep)
        self.best, self.ranks = None, report.ranks
        self.renew_optimizer()
        self.scheduler.step_update(self.update)
        self.scheduler.step(self.epoch - 1)
        lost = report.relative_error
        self.log.write(kind="prune", epoch=self.epoch, update=self.update, ranks=self.ranks, relative_error=lost)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """One update; images [batch, 3, size, size], labels [batch, ...]."""
        config, self.lr = self.config, float(self.optimizer.param_groups[0]["lr"])
        predicted = self.model(images)  # [batch, outputs, ...]
        loss = self.goal.loss(predicted, labels)
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.update += 1
        self.scheduler.step_update(self.update)
        loss, sums = loss.detach(), self.goal.statistics(self.goal.predict(predicted.detach()), labels)
        self.add(torch.cat([torch.stack([loss * len(labels), torch.full_like(loss, len(labels))]), sums]))
        self.bar.update(config.batch_size)
        if (self.update - 1) % config.log_every == 0:
            value = self.accelerator.reduce(loss, "mean").item()
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss is {value} at update {self.update}; lower lr or efft.scale")
            record = {"epoch": self.epoch, "update": self.update, "loss": value, "lr": self.lr}
            self.log.write(kind="step", **record, seconds=self.elapsed())
            self.show()

    def add(self, sums: torch.Tensor) -> None:
        """Adds a batch's loss and statistics to those of the epoch."""
        self.totals = sums.double() if len(self.totals) == 0 else self.totals + sums

    def show(self) -> tuple[float, dict[str, float]]:
        """Puts the epoch's mean loss and scores so far on the progress bar, and returns them.

        Both are means over all processes, computed in training mode.
        """
        totals, name = self.accelerator.reduce(self.totals, "sum"), self.goal.score
        loss, images = totals[:2].tolist()
        scores = self.goal.scores(totals[2:])
        best = [] if self.best is None else [f"val {score_text({name: self.best['scores'][name]})}"]
        self.bar.set_postfix_str(", ".join([f"loss {loss / images:.3f}", score_text({name: scores[name]}), *best]))
        return loss / images, scores

    @torch.no_grad()
    def evaluate(self, data: Dataset[Any], name: str) -> dict[str, float]:
        """Scores over a data set, in evaluation mode."""
        from tqdm.auto import tqdm

        if name not in self.eval_loaders:
            loader = self.loader(data, batch_size=self.config.eval_batch_size)
            self.eval_loaders[name] = self.accelerator.prepare(loader)
        loader = self.eval_loaders[name]
        self.model.eval()
        sums: Any = 0
        for images, labels in tqdm(loader, name, leave=False, disable=self.bar.disable, dynamic_ncols=True):
            pair = self.goal.predict(self.model(images)), labels
            sums = sums + self.goal.statistics(*self.accelerator.gather_for_metrics(pair))
        self.model.train()
        return self.goal.scores(sums)

    def finish(self) -> dict[str, Any]:
        """Loads the best epoch's weights, reads the test split for the first and only time, and writes the results."""
        if self.best is not None:
            restore_trained_state(self.plain, self.best["weights"])
        self.goal.finish(self.plain)
        test = self.evaluate(self.task.test, "test")
        self.plain = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False).eval()  # without autocast
        best = self.best or {"scores": dict.fromkeys(test), "epoch": None}
        scores = {f"test_{name}": score for name, score in test.items()}
        scores |= {f"val_{name}": score for name, score in best["scores"].items()} | {"best_epoch": best["epoch"]}
        self.log.track("test", test, self.update)
        run = {
            "epochs": self.epoch,
            "updates": self.update,
            "seconds": self.elapsed(),
            "device": str(self.accelerator.device),
            "processes": self.accelerator.num_processes,
            "own_model": self.own_model,
        }
        if self.accelerator.is_main_process:
            write_result(self.out, self.config, self.plain, self.task, scores, run)
        self.accelerator.wait_for_everyone()
        return read_result(self.out)

    def save(self) -> None:
        """Writes a checkpoint from which :meth:`restore` continues exactly here."""
        from accelerate.utils import gather_object

        own = {"totals": self.totals.cpu(), "random": random_state()}
        state = {
            "config": self.config.to_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "update": self.update,
            "weights": trained_state(self.plain),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
            "processes": gather_object([own]),
            "best": self.best,
            "ranks": self.ranks,
            "metrics_bytes": self.log.sync(),
            "seconds": self.elapsed(),
        }
        if self.accelerator.is_main_process:
            save_checkpoint(self.out / CHECKPOINT, state)

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to the point at which :meth:`save` wrote the state.

        Raises:
            CheckpointError: the state belongs to another run or was not written by :meth:`save`; discard this trainer
                then.
        """
        try:
            self._restore(state)
        except CheckpointError:
            raise
        except Exception as error:  # values in the state can have any type
            raise CheckpointError(
                f"the checkpoint does not fit this run ({error!r}); start it again with overwrite (--overwrite)"
            ) from error

    def _restore(self, state: dict[str, Any]) -> None:
        processes, index = state["processes"], self.accelerator.process_index
        if len(processes) != self.accelerator.num_processes:
            raise CheckpointError(
                f"the run was started with {len(processes)} processes and must go on with as many, "
                f"not {self.accelerator.num_processes}"
            )
        for name in ("epoch", "batch", "update", "metrics_bytes"):
            typed.check(name, state[name], int)
        self.epoch, self.batch, self.update = state["epoch"], state["batch"], state["update"]
        self.ranks = state.get("ranks")
        if self.ranks is not None:
            set_ranks(self.plain, self.ranks)
            self.renew_optimizer()
        restore_trained_state(self.plain, state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.totals = processes[index]["totals"].to(self.accelerator.device)
        self.best, self.seconds = state["best"], state["seconds"]
        self.log.cut(state["metrics_bytes"])
        self.bar.n = self.bar.initial = self.update * self.config.batch_size
        load_random_state(processes[index]["random"])

    def elapsed(self) -> float:
        """Seconds of training, including those before a resume."""
        return self.seconds + time.perf_counter() - self.clock

    def close(self) -> None:
        """Closes the progress bar, the metrics file and the trackers, and frees memory."""
        self.bar.close()
        self.log.close()
        self.accelerator.free_memory()
