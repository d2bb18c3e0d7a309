"""The parts of a run that a configuration names: data, model, optimizer, schedule, device."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import efft
from efft_lab import backbones
from efft_lab.train.config import TrainConfig
from efft_lab.train.methods import METHODS
from efft_lab.train.segmentation import Segmenter
from efft_lab.train.trackers import check_trackers

if TYPE_CHECKING:
    from efft_lab.data import TaskData


def make_accelerator(config: TrainConfig, trackers: Sequence[Any] = (), folder: Path | None = None) -> Any:
    """Accelerate's view of device, precision and processes; batch sizes are totals over the processes.

    Args:
        config: the run.
        trackers: names or objects of experiment trackers, see `efft_lab.train.run`.
        folder: where trackers put files.

    Raises:
        ImportError: accelerate is not installed, or what a tracker needs.
        ValueError: the precision needs another device, or there is no such tracker.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DataLoaderConfiguration
    except ImportError as error:
        raise ImportError("training needs accelerate: pip install 'efft-kernels[train]'") from error

    check_trackers(trackers)
    # The precision is process-wide state in Accelerate, which refuses to change it for a second run.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=config.amp,
        log_with=list(trackers) or None,
        project_dir=folder,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        step_scheduler_with_optimizer=False,
    )
    if config.amp == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("amp='fp16' needs a GPU, and this run is on the CPU; use amp='bf16' or 'no'")
    return accelerator


def load_task(config: TrainConfig) -> "TaskData":
    """The data set of the configuration, at the input size of its model."""
    import efft_lab.data

    return efft_lab.data.load(
        config.data,
        root=config.data_root,
        image_size=backbones.resolve_image_size(config.model, config.image_size),
        normalization=config.normalization,
        seed=config.data_seed,
        max_test=config.max_test,
        allow_non_commercial=config.allow_non_commercial,
        kind=config.task,
    )


def create_model(config: TrainConfig, classes: int, weights: bool = True) -> nn.Module:
    """The backbone of the configuration with a fresh head for its kind of task, nothing frozen yet.

    What is random in it depends on the seed of the configuration alone, so a random backbone can be made again.

    Args:
        config: names the model.
        classes: outputs of the head.
        weights: load the configuration's weights; False where they are about to be replaced.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        dense = config.task == "segmentation"
        model = backbones.create(
            config.model,
            0 if dense else classes,
            image_size=config.image_size,
            checkpoint=config.checkpoint if weights else None,
            drop_path=config.drop_path,
            pretrained=weights and config.pretrained and config.checkpoint is None,
        )
        return Segmenter(model, classes) if dense else model


def choose_trainable(model: nn.Module, config: TrainConfig) -> nn.Module:
    """Adapts or freezes the model, in place, as the method of the configuration says."""
    METHODS[config.method](model, config)
    return model


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW on everything trainable."""
    full = config.method == "full"
    groups = model.parameters() if full else efft.parameter_groups(model, config.lr, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, updates_per_epoch: int) -> Any:
    """timm's cosine schedule with linear warm-up, counted in epochs or updates.

    The trainer calls ``step_update(updates done)`` after every update and ``step(index of the epoch)`` after every
    epoch; timm ignores the one that does not apply. Passing the finished epoch's index is what the paper's code
    does, so with ``schedule_per="epoch"`` the first two epochs both run at `warmup_lr` and the peak is never reached.
    """
    from timm.scheduler import CosineLRScheduler

    in_epochs = config.schedule_per == "epoch"
    steps = config.epochs if in_epochs else config.epochs * updates_per_epoch
    return CosineLRScheduler(
        optimizer,
        t_initial=steps,
        warmup_t=round(config.warmup * steps),
        lr_min=config.min_lr,
        warmup_lr_init=config.warmup_lr,
        t_in_epochs=in_epochs,
    )
