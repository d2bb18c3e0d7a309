"""From what a run left on disk back to a model and its data."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

import efft
from efft.config import is_size, quote
from efft.saving.files import CONFIG
from efft.saving.io import read_description
from efft_lab.backbones import load_strict
from efft_lab.train import build, outputs
from efft_lab.train.checkpoint import restore_trained_state
from efft_lab.train.config import TrainConfig


def load_trained(path: str | Path, checkpoint: str | Path | None = None) -> tuple[nn.Module, TrainConfig]:
    """Rebuilds a trained model, in evaluation mode, with the configuration it was trained with.

    Args:
        path: folder of a finished run, or the adapter folder in it (which may have been moved elsewhere).
        checkpoint: file with the base's weights, if it is not where it was in training.

    Raises:
        FileNotFoundError: there is no finished run and no adapter.
        ValueError: the base cannot be rebuilt, or the adapter does not fit it.
    """
    path = Path(path)
    if (path / CONFIG).is_file():
        info = read_description(path)["info"]
        # Adapters from before these fields existed had their defaults.
        info = {"data_seed": 0, "task": "classification", **info}
        missing = [name for name in ("classes", *outputs.BASE_FIELDS) if name not in info]
        if missing:
            raise ValueError(
                f"the adapter in {path} does not name its base (its info lacks {', '.join(missing)}); build the base "
                "model and call efft.load_adapter(model, path)"
            )
        config, saved = TrainConfig(**{name: info[name] for name in outputs.BASE_FIELDS}), path
        classes = info["classes"]
    elif (path / outputs.RESULT).is_file():
        result = outputs.read_result(path)
        lacking = [name for name in ("own_model", "saved", "classes") if name not in result]
        if lacking or result["saved"] not in outputs.SAVED:
            what = f"lacks {', '.join(lacking)}" if lacking else f"names {quote(result['saved'])} as what was saved"
            raise ValueError(f"{path / outputs.RESULT} is damaged: it {what}")
        if result["own_model"]:
            raise ValueError(
                f"the run in {path} was given its model in Python, so it cannot be rebuilt from the configuration; "
                f"build it and load {path / result['saved']} into it"
            )
        config, saved = TrainConfig.from_dict(result["config"]), path / result["saved"]
        classes = result["classes"]
    else:
        hint = "; it is unfinished: go on with --resume" if (path / outputs.CHECKPOINT).exists() else ""
        raise FileNotFoundError(f"{path} holds no {outputs.RESULT} of a run and no {CONFIG} of an adapter{hint}")
    if not is_size(classes):
        raise ValueError(f"{path} is damaged: expected a number of classes, got {quote(classes)}")
    if checkpoint is not None:
        config = replace(config, checkpoint=str(checkpoint))
    model = build.create_model(config, classes, weights=config.method != "full")
    if config.adapter_config() is not None:
        efft.load_adapter(model, saved)
        efft.fuse(model)  # as it was in training: the same rounding
    elif config.method == "full":
        load_strict(model, outputs.read_tensors(saved), str(saved))
    else:
        restore_trained_state(build.choose_trainable(model, config), outputs.read_tensors(saved))
    return model.eval(), config


def task_for(config: TrainConfig, data: str | None = None, data_root: str | None = None) -> Any:
    """The data set a model was trained on, or another one prepared in the same way."""
    if data is not None:
        config = replace(config, data=data, data_root=data_root)
    return build.load_task(config)
