"""Adapt a model, train it, select the best epoch, test it once and save it.

A run can be killed at any moment and resumed from its last checkpoint. On a CPU, it then ends with exactly the weights
of an uninterrupted run. :func:`run` is the entry point. :class:`Trainer` holds the state of a run and the training
loop. :mod:`efft_lab.train.folder` reads and writes the files in the folder of a run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
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
    """The result of a run.

    Attributes:
        summary: the content of ``result.json``, which holds scores, parameter counts, sizes, seconds, versions and the
            configuration.
        model: the trained model in evaluation mode, with the selected weights. It is None if the run in the folder was
            already finished. In that case, :func:`efft_lab.train.build.load_trained` loads the model from the folder.
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
    """Train a model, test it once after training, and write everything to a folder.

    The function writes ``config.json``, ``metrics.jsonl`` (which grows during the run), ``checkpoint.pt`` (which is
    deleted at the end), the trained weights and ``result.json``. The weights of a method of ``efft.methods`` are in the
    subfolder ``adapter``. The weights of another method are in the file :attr:`efft_lab.train.methods.Method.saved`. On
    a CPU, a resumed run ends with exactly the same weights and scores as an uninterrupted run. The function also works
    under ``accelerate launch`` with several processes.

    Args:
        config: configuration of the run.
        out: folder for everything that the run writes.
        model: a model to train instead of the model that the configuration names. It must have a classifier and must
            not be adapted yet. It is changed in place.
        task: data to use instead of the data set that the configuration names.
        resume: whether to continue from the checkpoint in the folder. If the folder has no run, a new run starts. If
            the run is finished, its result is returned.
        overwrite: whether to delete the run in the folder and start again.
        progress: whether to show a progress bar.
        log_with: experiment trackers that also receive the numbers in ``metrics.jsonl``. A tracker is given by its name
            in accelerate ("tensorboard", "wandb", ...) or as an object of a class derived from accelerate's
            ``GeneralTracker``. Trackers write their files to the subfolder ``tracked``.

    Raises:
        ValueError: the arguments, the configuration, the model and the data do not fit together.
        FileExistsError: the folder contains a run, and neither ``resume`` nor ``overwrite`` is given.
        CheckpointError: the checkpoint is damaged, or the run in the folder has another configuration.
        FloatingPointError: a recorded loss is not finite.
        ImportError: accelerate or a package that a tracker needs is not installed.
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
            accelerator.print(f"{out}: continuing after update {trainer.update} of {trainer.updates}")
        start_trackers(accelerator, out / TRACKED, config, trainer.update)
        while trainer.epoch < config.epochs:
            trainer.train_epoch()
        return RunResult(trainer.finish(), trainer.plain)
    finally:
        trainer.close()


class Trainer:
    """Hold the state of a run and train it.

    Args:
        config: configuration of the run.
        out: folder of the run.
        accelerator: from :func:`efft_lab.train.build.make_accelerator`.
        model: the model to train. With None, the model that the configuration names is created.
        task: the data. With None, the data set that the configuration names is loaded.
        progress: whether to show a progress bar.
        checkpoints: whether to write checkpoints.

    Attributes:
        epoch: number of finished epochs.
        batch: number of finished batches of the current epoch.
        update: number of finished updates of the weights.
        plain: the model without accelerate's wrappers.
        best: scores, epoch and weights of the epoch with the best validation score so far. It is None before the first
            validation, after pruning until the next validation, and always with the protocol "final".

    Raises:
        ValueError: ``prune_at`` is set, but several processes run.
    """

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        accelerator: Any,
        model: nn.Module | None,
        task: TaskData | None,
        progress: bool = True,
        checkpoints: bool = True,
    ) -> None:
        from accelerate.utils import set_seed
        from tqdm.auto import tqdm

        if config.prune_at is not None and accelerator.num_processes > 1:
            raise ValueError(f"prune_at needs a single process, got {accelerator.num_processes}; leave out prune_at")
        self.config, self.out, self.accelerator, self.checkpoints = config, out, accelerator, checkpoints
        with accelerator.main_process_first():  # one process downloads, the others use the cache
            self.task = load_task(config) if task is None else task
            self.own_model = model is not None
            model = create_model(config, self.task.classes) if model is None else model
        self.goal = make_goal(config, self.task, model)
        set_seed(config.seed)
        self.plain = model.train()
        METHODS[config.method].apply(self.plain, config.settings())
        train = self.task.trainval if config.protocol == "final" else self.task.train
        self.batches = EpochBatches(len(train), config.batch_size, config.seed)
        loader: DataLoader[Any] = self.loader(train, batch_sampler=self.batches)
        optimizer, self.scheduler = self.make_optimizer()
        self.model, self.optimizer, self.train_loader = accelerator.prepare(self.plain, optimizer, loader)
        set_seed(config.seed, device_specific=True)  # processes must not share their dropout masks

        self.eval_loaders: dict[str, Any] = {}

        self.epoch = self.batch = self.update = 0
        self.lr = 0.0  # learning rate of the last update
        self.updates = config.epochs * len(self.batches)
        self.totals = torch.zeros(0)  # sums over the epoch: loss, images, statistics of the goal
        self.best: dict[str, Any] | None = None
        self.ranks: dict[str, tuple[int, int]] | None = None  # ranks after pruning
        self.seconds, self.clock = 0.0, time.perf_counter()
        main = accelerator.is_main_process
        self.log = MetricsLog(out / METRICS if main else None, accelerator)
        hidden = not (main and progress)
        self.bar = tqdm(total=self.updates * config.batch_size, unit="img", disable=hidden, dynamic_ncols=True)

    def loader(self, data: Dataset[Any], **options: Any) -> DataLoader[Any]:
        """Create a loader with its own random numbers, which therefore do not change those of dropout."""
        workers = self.config.workers
        options |= {"pin_memory": self.accelerator.device.type == "cuda", "persistent_workers": workers > 0}
        return DataLoader(data, num_workers=workers, generator=torch.Generator(), **options)

    def make_optimizer(self) -> tuple[torch.optim.AdamW, Any]:
        """Create an optimizer for the parameters that are trainable now, and the schedule of the whole run."""
        config = self.config
        groups = METHODS[config.method].parameter_groups(self.plain, config.lr, config.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
        return optimizer, make_scheduler(optimizer, config, len(self.batches))

    def renew_optimizer(self) -> None:
        """Create a new optimizer and a new schedule, because pruning has replaced the factors.

        The moments of the new optimizer are zero.
        """
        optimizer, self.scheduler = self.make_optimizer()
        self.optimizer = self.accelerator.prepare(optimizer)

    def train_epoch(self) -> None:
        """Train to the end of the current epoch, validate, and write the epoch's record and a checkpoint."""
        for images, labels in self.epoch_batches():
            self.step(images, labels)

    def epoch_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the remaining batches of the current epoch; the caller makes one update from each.

        After the last update, validate, and write the epoch's record and a checkpoint.
        """
        config, started = self.config, self.elapsed()
        self.bar.set_description(f"epoch {self.epoch + 1}/{config.epochs}")
        self.batches.start(self.epoch, skip=self.batch)
        skipped = self.batch
        for images, labels in self.train_loader:
            yield images, labels
            self.batch += 1
            due = config.checkpoint_every and self.update % config.checkpoint_every == 0
            if due and self.batch < len(self.batches):  # after the last batch, the checkpoint of the epoch is written
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
        """Reduce the ranks and renew the optimizer. Discard the best epoch so far, because its weights have other
        ranks."""
        report = prune(self.plain, self.config.prune_keep)
        self.best, self.ranks = None, report.ranks
        self.renew_optimizer()
        self.scheduler.step_update(self.update)
        self.scheduler.step(self.epoch - 1)
        lost = report.relative_error
        self.log.write(kind="prune", epoch=self.epoch, update=self.update, ranks=self.ranks, relative_error=lost)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Make one update, from images [batch, 3, size, size] and labels [batch, ...]."""
        predicted = self.model(images)  # [batch, outputs, ...]
        loss = self.goal.loss(predicted, labels)
        self.accelerator.backward(loss)
        self.update_weights(predicted, loss, labels)

    def update_weights(self, predicted: torch.Tensor, loss: torch.Tensor, labels: torch.Tensor) -> None:
        """Make one update from the gradients of ``loss``, and record the loss and the scores of the batch."""
        config, self.lr = self.config, float(self.optimizer.param_groups[0]["lr"])
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
        """Add a batch's loss and statistics to the sums of the epoch."""
        self.totals = sums.double() if len(self.totals) == 0 else self.totals + sums

    def show(self) -> tuple[float, dict[str, float]]:
        """Show the mean loss and the scores of the current epoch on the progress bar, and return them.

        The loss and the scores cover all images on which all processes have trained in this epoch. They were computed
        in training mode.
        """
        totals, name = self.accelerator.reduce(self.totals, "sum"), self.goal.score
        loss, images = totals[:2].tolist()
        scores = self.goal.scores(totals[2:])
        best = [] if self.best is None else [f"val {score_text({name: self.best['scores'][name]})}"]
        self.bar.set_postfix_str(", ".join([f"loss {loss / images:.3f}", score_text({name: scores[name]}), *best]))
        return loss / images, scores

    @torch.no_grad()
    def evaluate(self, data: Dataset[Any], name: str) -> dict[str, float]:
        """Compute the scores over a data set in evaluation mode.

        ``name`` identifies the data set: its loader is created once for each name.
        """
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
        """Load the weights of the best epoch (if there is one), test the model, and write the results.

        The test split is not read at any other time.
        """
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
        """Write a checkpoint, unless they are off. :meth:`restore` returns to exactly this point of the training."""
        from accelerate.utils import gather_object

        if not self.checkpoints:
            return
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
        """Return to the point at which :meth:`save` wrote the state.

        Raises:
            CheckpointError: the state belongs to another run or was not written by :meth:`save`. Do not use the trainer
                after this error.
        """
        try:
            self._restore(state)
        except CheckpointError:
            raise
        except Exception as error:  # a damaged state can contain values of any type
            raise CheckpointError(
                f"the checkpoint does not fit this run ({error!r}); start it again with overwrite (--overwrite)"
            ) from error

    def _restore(self, state: dict[str, Any]) -> None:
        processes, index = state["processes"], self.accelerator.process_index
        if len(processes) != self.accelerator.num_processes:
            raise CheckpointError(
                f"the run was started with {len(processes)} processes and must be resumed with the same number, "
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
        """Return the time since the start of the run in seconds. The time between two processes is not included."""
        return self.seconds + time.perf_counter() - self.clock

    def close(self) -> None:
        """Close the progress bar, the metrics file and the trackers, and free memory."""
        self.bar.close()
        self.log.close()
        self.accelerator.free_memory()
