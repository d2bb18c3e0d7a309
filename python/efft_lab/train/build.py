"""Create the data, model, batches, accelerator and schedule of a run from its configuration. Reload trained models.

The accelerator is accelerate's object for the device, the precision and the processes of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Sampler

from efft.config import is_size, quote
from efft.saving.files import CONFIG
from efft.saving.io import read_description
from efft_lab import backbones
from efft_lab.train import folder as run_folder
from efft_lab.train.config import TrainConfig
from efft_lab.train.methods import METHODS, saved_names
from efft_lab.train.segmentation import Segmenter

if TYPE_CHECKING:
    from efft_lab.data import TaskData


def load_task(config: TrainConfig) -> TaskData:
    """Load the data set of the configuration.

    The images get the size in the configuration or, if it has none, the default input size of its model.
    """
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
    """Create the backbone that the configuration names, with a new head for the configured kind of task.

    No parameter is frozen yet. Random weights depend only on the seed in the configuration. The same configuration
    therefore always gives the same model.

    Args:
        config: the configuration.
        classes: number of outputs of the head.
        weights: whether to load the backbone weights that the configuration names. Pass False if the caller loads other
            weights afterwards.
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


class EpochBatches(Sampler[list[int]]):
    """Yield shuffled batches of indices and drop an incomplete last batch.

    The order depends only on the seed and the epoch. A resumed run therefore uses the same batches.

    Args:
        size: number of images.
        batch_size: number of images per batch, summed over all processes.
        seed: seed of the order. Each epoch has a different order.

    Raises:
        ValueError: the data set has fewer images than one batch.
    """

    drop_last = True

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        if size < batch_size:
            raise ValueError(
                f"the training split has {size} images, fewer than one batch of {batch_size}; lower batch_size"
            )
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self._epoch, self._skip = 0, 0

    def start(self, epoch: int, skip: int = 0) -> None:
        """Select the epoch of the next iteration and skip its first ``skip`` batches without reading them."""
        self._epoch, self._skip = epoch, skip

    def __len__(self) -> int:
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self.seed, self._epoch)).permutation(self.size).tolist()
        for batch in range(self._skip, len(self)):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size]


def make_accelerator(config: TrainConfig, trackers: Sequence[Any] = (), folder: Path | None = None) -> Any:
    """Create the accelerator of a run.

    The accelerator divides each batch among the processes. Batch sizes are therefore totals over all processes.

    Args:
        config: configuration of the run.
        trackers: names or objects of experiment trackers, see :func:`efft_lab.train.run`.
        folder: folder for the files of the trackers.

    Raises:
        ImportError: accelerate or a package that a tracker needs is not installed.
        ValueError: fp16 is requested on a CPU, or accelerate does not know a tracker.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DataLoaderConfiguration
    except ImportError as error:
        raise ImportError("training needs accelerate: pip install 'efft-kernels[train]'") from error

    run_folder.check_trackers(trackers)
    # accelerate stores the precision for the whole process and does not allow a second run to change it.
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


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, updates_per_epoch: int) -> Any:
    """Create timm's cosine schedule with linear warm-up, which changes the learning rate per epoch or per update.

    The caller must call ``step_update(number of finished updates)`` after every update and ``step(index of the finished
    epoch)`` after every epoch. timm ignores the call that does not apply.

    As in the paper's code, ``step`` receives the index of the finished epoch, not of the next one. With
    ``schedule_per="epoch"``, the first two epochs of a warm-up therefore both run at ``warmup_lr``. The cosine starts
    together with the warm-up and has already decreased when the warm-up ends. With a warm-up of 10 %, the learning rate
    therefore reaches only about 98 % of ``lr``.
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


def load_trained(path: str | Path, checkpoint: str | Path | None = None) -> tuple[nn.Module, TrainConfig]:
    """Create a model again, load its trained weights, and return it in evaluation mode with its training configuration.

    If only an adapter is given, the configuration has default values in the fields that the adapter does not store.

    Args:
        path: folder of a finished run, or the adapter folder of a run (which may have been moved elsewhere).
        checkpoint: file with the weights of the base model, if the file has moved since training.

    Raises:
        FileNotFoundError: the folder contains neither a finished run nor an adapter.
        ValueError: a file is damaged, the base model cannot be created again, or the weights do not fit the base model.
    """
    path = Path(path)
    if (path / CONFIG).is_file():
        info = read_description(path)["info"]
        # Adapters from before these fields existed were trained with the following values.
        info = {"data_seed": 0, "task": "classification", **info}
        missing = [name for name in ("classes", *run_folder.BASE_FIELDS) if name not in info]
        if missing:
            raise ValueError(
                f"the adapter in {path} does not name its base model (its info lacks {', '.join(missing)}); create the "
                "base model and call efft.load_adapter(model, path)"
            )
        config, saved = TrainConfig(**{name: info[name] for name in run_folder.BASE_FIELDS}), path
        classes = info["classes"]
    elif (path / run_folder.RESULT).is_file():
        result = run_folder.read_result(path)
        lacking = [name for name in ("own_model", "saved", "classes") if name not in result]
        if lacking or result["saved"] not in saved_names():
            what = (
                f"lacks {', '.join(lacking)}"
                if lacking
                else f"gives {quote(result['saved'])} as the name of the saved weights"
            )
            raise ValueError(f"{path / run_folder.RESULT} is damaged: it {what}")
        if result["own_model"]:
            raise ValueError(
                f"the model of the run in {path} was created in Python, so the configuration does not describe it; "
                f"create the model and load {path / result['saved']} into it"
            )
        config, saved = TrainConfig.from_dict(result["config"]), path / result["saved"]
        classes = result["classes"]
    else:
        hint = "; the run is unfinished: continue it with --resume" if (path / run_folder.CHECKPOINT).exists() else ""
        raise FileNotFoundError(
            f"{str(path)!r} contains no {run_folder.RESULT} of a run and no {CONFIG} of an adapter{hint}"
        )
    if not is_size(classes):
        raise ValueError(f"{path} is damaged: expected a number of classes, got {quote(classes)}")
    if checkpoint is not None:
        config = replace(config, checkpoint=str(checkpoint))
    method = METHODS[config.method]
    model = create_model(config, classes, weights=not method.whole)
    method.load(model, config.settings(), saved)
    return model.eval(), config


def load_task_for(config: TrainConfig, data: str | None = None, data_root: str | None = None) -> TaskData:
    """Load the data set on which a model was trained, or another data set with the same preprocessing.

    Args:
        config: training configuration of the model, from :func:`load_trained`.
        data: name or folder of another data set; None for the data set in the configuration.
        data_root: folder with the files of ``data``. It is ignored if ``data`` is None.
    """
    if data is not None:
        config = replace(config, data=data, data_root=data_root)
    return load_task(config)
