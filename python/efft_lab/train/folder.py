"""The folder of a run: opening it safely, and what is written there at the end."""

import json
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import efft
from efft.planning.targets import find_head
from efft.saving.files import read_json, replace_file
from efft_lab.backbones import DEFAULT
from efft_lab.train import checkpoint
from efft_lab.train.config import TrainConfig

CONFIG, METRICS, CHECKPOINT, RESULT = "config.json", "metrics.jsonl", "checkpoint.pt", "result.json"
SAVED = ADAPTER, HEAD, MODEL, TRAINED = "adapter", "head.safetensors", "model.safetensors", "trained.safetensors"

TRACKED = "tracked"  # files of experiment trackers

#: Fields of TrainConfig that an adapter keeps as its info: they rebuild its base model and the images it expects.
BASE_FIELDS = (
    "task",
    "model",
    "checkpoint",
    "pretrained",
    "image_size",
    "normalization",
    "data",
    "data_root",
    "data_seed",
    "allow_non_commercial",
    "protocol",
    "seed",
)


def open_folder(
    out: Path, config: TrainConfig, resume: bool, overwrite: bool, main_process: bool
) -> tuple[dict[str, Any] | None, bool]:
    """Prepares the folder of a run.

    Returns:
        What to go on from: nothing, a checkpoint, or the result of the finished run; and whether it is the latter.

    Raises:
        ValueError: both `resume` and `overwrite`.
        FileExistsError: the folder holds a run, and neither is given.
        CheckpointError: the checkpoint is damaged or of another configuration.
    """
    if resume and overwrite:
        raise ValueError("give either resume (--resume) or overwrite (--overwrite), not both")
    finished, started = (out / RESULT).exists(), (out / CHECKPOINT).exists()
    if (finished or started) and not overwrite:
        if not resume:
            raise FileExistsError(
                f"{out} holds {'a finished' if finished else 'an unfinished'} run; go on with it with resume=True "
                "(--resume), start again with overwrite=True (--overwrite), or choose another folder"
            )
        held = read_result(out) if finished else checkpoint.load(out / CHECKPOINT)
        checkpoint.check_config({**TrainConfig().to_dict(), **held["config"]}, config.to_dict())
        return held, finished
    if main_process:
        out.mkdir(parents=True, exist_ok=True)
        for name in (RESULT, CHECKPOINT, METRICS, HEAD, MODEL, TRAINED):
            (out / name).unlink(missing_ok=True)
        for name in (ADAPTER, TRACKED):
            shutil.rmtree(out / name, ignore_errors=True)
        config.save(out / CONFIG)
    return None, False


def read_result(out: Path) -> dict[str, Any]:
    """The content of a run's ``result.json``.

    Raises:
        ValueError: it is damaged.
    """
    result = read_json(out / RESULT)
    if not isinstance(result, dict) or not isinstance(result.get("config"), dict):
        raise ValueError(f"{out / RESULT} is damaged: it must hold a JSON object with the run's 'config'")
    return result


def write(
    out: Path, config: TrainConfig, model: nn.Module, task: Any, scores: dict[str, Any], run: dict[str, Any]
) -> dict[str, Any]:
    """Saves what was trained and then ``result.json``, which marks the run as finished.

    Args:
        out: folder of the run.
        config: configuration of the run.
        model: the trained model, out of Accelerate's wrappers.
        task: what it was trained on.
        scores: of test and validation, and the epoch they belong to.
        run: updates, seconds, device and the like; ``own_model`` says that the model is not the configuration's.
    """
    from safetensors.torch import save as serialize

    if config.adapter_config() is not None:
        facts = {} if run["own_model"] else {name: getattr(config, name) for name in BASE_FIELDS}
        facts |= {"classes": task.classes, **scores, **card_facts(config, model, task, scores, run["own_model"])}
        saved = efft.save_adapter(model, out / ADAPTER, info=facts)
    else:
        saved = out / {"full": MODEL, "linear": HEAD}.get(config.method, TRAINED)
        state = model.state_dict() if config.method == "full" else checkpoint.trained_state(model)
        replace_file(saved, serialize({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}))
    files = saved.iterdir() if saved.is_dir() else [saved]
    result = {
        **scores,
        "classes": task.classes,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "head_parameters": sum(
            p.numel() for name in find_head(model, None) for p in model.get_submodule(name).parameters()
        ),
        "factor_parameters": efft.count_parameters(model).factors,
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "saved": saved.name,
        "saved_bytes": sum(file.stat().st_size for file in files),
        **run,
        "versions": _versions(),
        "config": config.to_dict(),
    }
    replace_file(out / RESULT, (json.dumps(result, indent=2) + "\n").encode())
    (out / CHECKPOINT).unlink(missing_ok=True)
    return result


def card_facts(
    config: TrainConfig, model: nn.Module, task: Any, scores: Mapping[str, Any], own_model: bool
) -> dict[str, Any]:
    """What the model card says at its top, as far as it is known: base_model, license, datasets, metrics."""
    test = {name.removeprefix("test_"): score for name, score in scores.items() if name.startswith("test_")}
    facts: dict[str, Any] = {"datasets": [task.info.name]} if hasattr(task, "info") else {}
    facts["metrics"] = test
    published: Any = getattr(getattr(model, "backbone", model), "pretrained_cfg", None)
    if own_model or config.checkpoint or not config.pretrained or config.model == DEFAULT or not published:
        return facts
    known = {"base_model": published.get("hf_hub_id"), "license": published.get("license")}
    return {name: fact for name, fact in known.items() if fact} | facts


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The content of a safetensors file.

    Raises:
        ValueError: the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error


def _versions() -> dict[str, str]:
    import accelerate
    import timm

    import efft_kernels

    return {
        "efft-kernels": efft_kernels.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
    }
