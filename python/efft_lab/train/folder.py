"""Read and write the files in the folder of a run: the metrics, the checkpoint, the result and the trackers' files.

Trackers are the experiment trackers of the library accelerate, such as TensorBoard.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import efft
import efft_kernels
from efft.adapting.heads import find_head
from efft.config import is_number
from efft.methods import EfftConfig
from efft.saving.files import read_json, replace_file, replacing
from efft_lab import typed
from efft_lab.backbones import DEFAULT
from efft_lab.record import versions
from efft_lab.train.config import TrainConfig
from efft_lab.train.methods import METHODS, saved_names

CONFIG, METRICS, CHECKPOINT, RESULT = "config.json", "metrics.jsonl", "checkpoint.pt", "result.json"
TRACKED = "tracked"  # subfolder for the files of experiment trackers
_PROJECT = "efft"  # name of the project in experiment trackers

#: Fields of TrainConfig that an adapter stores in its info. They determine the base model and its inputs.
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
_CHECKPOINT_FORMAT = 2
# Fields of TrainConfig that may change when a run is resumed, because they do not affect its result.
_FREE_FIELDS = ("checkpoint_every", "workers")


def open_folder(
    out: Path, config: TrainConfig, resume: bool, overwrite: bool, main_process: bool
) -> tuple[dict[str, Any] | None, bool]:
    """Prepare the folder of a run.

    For a new run, the folder is created, the files of a previous run are deleted, and ``config.json`` is written. Only
    the main process does this. If a run is resumed, its state is read.

    Returns:
        A pair. The first element is None for a new run, the content of ``result.json`` for a finished run, and the
        state in the checkpoint for an unfinished run. The second element is True if the run is finished.

    Raises:
        ValueError: both ``resume`` and ``overwrite`` are given, or ``result.json`` is damaged.
        FileExistsError: the folder contains a run, and neither ``resume`` nor ``overwrite`` is given.
        CheckpointError: the checkpoint is damaged, or the run in the folder has another configuration.
    """
    if resume and overwrite:
        raise ValueError("give either resume (--resume) or overwrite (--overwrite), not both")
    finished, started = (out / RESULT).exists(), (out / CHECKPOINT).exists()
    if (finished or started) and not overwrite:
        if not resume:
            raise FileExistsError(
                f"{out} holds {'a finished' if finished else 'an unfinished'} run; continue it with resume=True "
                "(--resume), start again with overwrite=True (--overwrite), or choose another folder"
            )
        held = read_result(out) if finished else load_checkpoint(out / CHECKPOINT)
        check_config({**TrainConfig().to_dict(), **held["config"]}, config.to_dict())
        return held, finished
    if main_process:
        out.mkdir(parents=True, exist_ok=True)
        for path in [out / name for name in (RESULT, CHECKPOINT, METRICS, TRACKED, *saved_names())]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        config.save(out / CONFIG)
    return None, False


def read_result(out: Path) -> dict[str, Any]:
    """Read a run's ``result.json``.

    Raises:
        ValueError: the file is damaged.
    """
    result = read_json(out / RESULT)
    if not isinstance(result, dict) or not isinstance(result.get("config"), dict):
        raise ValueError(f"{out / RESULT} is damaged: it must hold a JSON object with the run's 'config'")
    return result


def write_result(
    out: Path, config: TrainConfig, model: nn.Module, task: Any, scores: dict[str, Any], run: dict[str, Any]
) -> dict[str, Any]:
    """Save the trained weights, then write ``result.json``, which marks the run as finished.

    Args:
        out: folder of the run.
        config: configuration of the run.
        model: the trained model without accelerate's wrappers.
        task: the data on which the model was trained.
        scores: test and validation scores, and the epoch whose weights were selected.
        run: number of updates, seconds, device and similar facts. ``run["own_model"]`` is True if the caller of
            :func:`efft_lab.train.run` provided the model.

    Returns:
        The content of ``result.json``.
    """
    info = {} if run["own_model"] else {name: getattr(config, name) for name in BASE_FIELDS}
    info |= {"classes": task.classes, **scores, **card_facts(config, model, task, scores, run["own_model"])}
    saved = METHODS[config.method].save(model, out, info)
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
        "versions": {
            "efft-kernels": efft_kernels.__version__,
            "torch": torch.__version__,
            **versions("timm", "accelerate"),
        },
        "config": config.to_dict(),
    }
    replace_file(out / RESULT, (json.dumps(result, indent=2) + "\n").encode())
    (out / CHECKPOINT).unlink(missing_ok=True)
    return result


def card_facts(
    config: TrainConfig, model: nn.Module, task: Any, scores: Mapping[str, Any], own_model: bool
) -> dict[str, Any]:
    """Return the facts for the header of the adapter's model card, as far as they are known.

    The facts are ``metrics`` (the test scores) and, if the data set has a name, ``datasets``. If training started from
    published weights of timm, ``base_model`` and ``license`` are added.
    """
    test = {name.removeprefix("test_"): score for name, score in scores.items() if name.startswith("test_")}
    facts: dict[str, Any] = {"datasets": [task.info.name]} if hasattr(task, "info") else {}
    facts["metrics"] = test
    published: Any = getattr(getattr(model, "backbone", model), "pretrained_cfg", None)
    if own_model or config.checkpoint or not config.pretrained or config.model == DEFAULT or not published:
        return facts
    known = {"base_model": published.get("hf_hub_id"), "license": published.get("license")}
    return {name: fact for name, fact in known.items() if fact} | facts


class CheckpointError(RuntimeError):
    """Raised if a checkpoint is damaged or belongs to another run."""


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state (tensors and plain Python values) to a file.

    If the process is killed at any moment, the file holds either this state or the previous state.
    """
    with replacing(path) as file:
        torch.save({**state, "format": _CHECKPOINT_FORMAT}, file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a file that :func:`save_checkpoint` wrote. All tensors are loaded to the CPU.

    Raises:
        FileNotFoundError: the file does not exist.
        PermissionError: the file may not be read.
        CheckpointError: the file is damaged or has another format.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("it is compressed")  # a small compressed file could fill the memory
            damaged = archive.testzip()  # torch stores checksums but does not verify them
        if damaged is not None:
            raise ValueError(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # a damaged archive or pickle can raise nearly anything
        raise CheckpointError(
            f"checkpoint {path} is damaged ({error}); start the run again with overwrite (--overwrite)"
        ) from error
    found = state.get("format") if isinstance(state, dict) else None
    if type(found) is not int or found != _CHECKPOINT_FORMAT:
        raise CheckpointError(f"checkpoint {path} has format {found}; this version reads {_CHECKPOINT_FORMAT}")
    if not isinstance(state.get("config"), dict):
        raise CheckpointError(f"checkpoint {path} does not hold the configuration of its run")
    return dict(state)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one mapping with names such as ``efft.rank``."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return out


def check_config(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Check that a run is resumed with its original configuration.

    The fields ``checkpoint_every`` and ``workers`` may differ.

    Args:
        saved: ``TrainConfig.to_dict()`` of the run in the folder.
        current: ``TrainConfig.to_dict()`` of the run that resumes.

    Raises:
        CheckpointError: another field differs. The message names every field that differs, with both values.
    """
    # The round trip through JSON converts tuples to lists.
    old, new = (flatten(json.loads(json.dumps(values))) for values in (saved, current))
    if isinstance(saved.get("efft"), Mapping):  # an older run may lack settings, which then had the following values
        old = flatten(EfftConfig.meant_before, "efft.") | old
    differing = [
        f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if name not in _FREE_FIELDS and old.get(name) != new.get(name)
    ]
    if differing:
        raise CheckpointError(f"cannot resume with another configuration: {'; '.join(differing)}")


def random_state() -> dict[str, Any]:
    """Return the states of this process's random number generators: Python, NumPy, and torch on the CPU and the GPU.

    The entry for the GPU is the state of the current device, or None if CUDA is not used.
    """
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": (version, internal, gauss),
        "numpy": (kind, torch.from_numpy(np.array(keys, dtype=np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def load_random_state(state: Mapping[str, Any]) -> None:
    """Restore the states that :func:`random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


class MetricsLog:
    """Append records to a file of JSON lines immediately, and pass their numbers to the trackers of a run.

    Args:
        path: the file. With None, nothing is written to a file. All processes except the main process pass None.
        accelerator: the accelerator that has the trackers; None without trackers.
    """

    def __init__(self, path: Path | None, accelerator: Any = None) -> None:
        self._accelerator = accelerator
        self._file = None if path is None else open(path, "ab")  # noqa: SIM115  # closed at the end of the run

    def cut(self, size: int) -> None:
        """Remove everything after the first ``size`` bytes of the file.

        Raises:
            CheckpointError: the file has less than ``size`` bytes, which happens only if something else changed it.
        """
        if self._file is None:
            return
        if self._file.tell() < size:
            raise CheckpointError(
                f"{self._file.name} has {self._file.tell()} bytes, but had {size} when its checkpoint was written"
            )
        self._file.truncate(size)

    def write(self, **record: Any) -> None:
        """Append one record, which other processes can read immediately, and pass its numbers to the trackers.

        The record must have the fields ``kind`` (such as "step" or "epoch") and ``update`` (the number of updates so
        far).
        """
        if self._file is not None:
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
        self.track(record["kind"], record, record["update"])

    def track(self, kind: str, values: Mapping[str, Any], step: int) -> None:
        """Pass the numbers among the values to the trackers, under names that begin with ``kind/``."""
        numbers = {f"{kind}/{name}": value for name, value in values.items() if is_number(value) and name != "update"}
        if self._accelerator is not None and self._accelerator.trackers:
            self._accelerator.log(numbers, step=step)

    def sync(self) -> int:
        """Write all records to the disk, and return the length of the file in bytes (0 without a file)."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file and the trackers."""
        for tracker in getattr(self._accelerator, "trackers", ()):
            tracker.finish()
        if self._file is not None:
            self._file.close()


def read_metrics(path: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Read the records of a ``metrics.jsonl``, or only the records of one kind (``step``, ``epoch`` or ``prune``).

    If a process is still writing the last line, this line is omitted.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]
    records = [json.loads(line) for line in lines]
    return [record for record in records if kind in (None, record["kind"])]


def check_trackers(trackers: Sequence[Any]) -> None:
    """Raise an error for trackers that accelerate would silently ignore.

    Args:
        trackers: names, or objects derived from accelerate's ``GeneralTracker``.

    Raises:
        ValueError: a name is unknown to accelerate.
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


def start_trackers(accelerator: Any, folder: Path, config: TrainConfig, update: int) -> None:
    """Start the trackers of a run and pass them the configuration of the run.

    Args:
        accelerator: from :func:`efft_lab.train.build.make_accelerator`.
        folder: folder for the files of the trackers. In W&B, the run gets the name of the parent folder.
        config: configuration of the run.
        update: number of updates that a resumed run has already finished; 0 for a new run. TensorBoard drops all
            records of later updates, which the interrupted process wrote after the checkpoint.
    """
    if not accelerator.log_with:
        return
    folder.mkdir(exist_ok=True)
    values = {
        name: value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in flatten(config.to_dict()).items()
    }
    wandb = {"name": folder.resolve().parent.name, "dir": str(folder)}
    options = {"wandb": wandb, "tensorboard": {"purge_step": update + 1 if update else None}}
    accelerator.init_trackers(_PROJECT, values, options)
