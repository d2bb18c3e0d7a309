"""From a configuration, or from what a run left on disk, to a model and its data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from efft.config import is_size, shown
from efft.saving.files import CONFIG
from efft.saving.io import read_description
from efft_lab import backbones
from efft_lab.train import folder
from efft_lab.train.config import TrainConfig
from efft_lab.train.methods import METHODS, saved_names
from efft_lab.train.segmentation import Segmenter

if TYPE_CHECKING:
    from efft_lab.data import TaskData


def load_task(config: TrainConfig) -> TaskData:
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
    """The backbone of the configuration with a fresh head for its kind of task; nothing is frozen yet.

    Everything random in it depends on the seed of the configuration alone, so a random backbone can be made again.

    Args:
        config: names the model.
        classes: number of outputs of the head.
        weights: load the configuration's weights; False if they are about to be replaced.
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


def load_trained(path: str | Path, checkpoint: str | Path | None = None) -> tuple[nn.Module, TrainConfig]:
    """Rebuilds a trained model, in evaluation mode, and the configuration it was trained with.

    Args:
        path: folder of a finished run, or the adapter folder in it (which may have been moved elsewhere).
        checkpoint: file with the base's weights, if it has moved since training.

    Raises:
        FileNotFoundError: the folder holds neither a finished run nor an adapter.
        ValueError: the base cannot be rebuilt, or the adapter does not fit it.
    """
    path = Path(path)
    if (path / CONFIG).is_file():
        info = read_description(path)["info"]
        # Adapters written before these fields existed used their defaults.
        info = {"data_seed": 0, "task": "classification", **info}
        missing = [name for name in ("classes", *folder.BASE_FIELDS) if name not in info]
        if missing:
            raise ValueError(
                f"the adapter in {path} does not name its base (its info lacks {', '.join(missing)}); build the base "
                "model and call efft.load_adapter(model, path)"
            )
        config, saved = TrainConfig(**{name: info[name] for name in folder.BASE_FIELDS}), path
        classes = info["classes"]
    elif (path / folder.RESULT).is_file():
        result = folder.read_result(path)
        lacking = [name for name in ("own_model", "saved", "classes") if name not in result]
        if lacking or result["saved"] not in saved_names():
            what = f"lacks {', '.join(lacking)}" if lacking else f"names {shown(result['saved'])} as what was saved"
            raise ValueError(f"{path / folder.RESULT} is damaged: it {what}")
        if result["own_model"]:
            raise ValueError(
                f"the run in {path} was given its model in Python, so it cannot be rebuilt from the configuration; "
                f"build it and load {path / result['saved']} into it"
            )
        config, saved = TrainConfig.from_dict(result["config"]), path / result["saved"]
        classes = result["classes"]
    else:
        hint = "; it is unfinished: go on with --resume" if (path / folder.CHECKPOINT).exists() else ""
        raise FileNotFoundError(f"{path} holds no {folder.RESULT} of a run and no {CONFIG} of an adapter{hint}")
    if not is_size(classes):
        raise ValueError(f"{path} is damaged: expected a number of classes, got {shown(classes)}")
    if checkpoint is not None:
        config = replace(config, checkpoint=str(checkpoint))
    method = METHODS[config.method]
    model = create_model(config, classes, weights=not method.whole)
    method.load(model, config.settings(), saved)
    return model.eval(), config


def load_task_for(config: TrainConfig, data: str | None = None, data_root: str | None = None) -> TaskData:
    """The data set on which a model was trained, or another one that is prepared in the same way.

    Args:
        config: of the model, from :func:`load_trained`.
        data: another data set; None for the configuration's own.
        data_root: folder with that data set's files.
    """
    if data is not None:
        config = replace(config, data=data, data_root=data_root)
    return load_task(config)
