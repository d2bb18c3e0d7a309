"""Execute runs of a suite in a separate process.

``python -m efft_lab.compare.worker`` reads jobs from its standard input and prints one answer for each job. A job is
one run, or several runs that are trained together. Every job and every answer is one line of JSON.
:mod:`efft_lab.compare.runner` starts such processes.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from efft_lab.compare.suite import TRIVIAL
from efft_lab.train import build, read_metrics, run, run_together
from efft_lab.train.config import TrainConfig
from efft_lab.train.methods import METHODS
from efft_lab.train.probe import FeatureTask, Head, WithoutTest

# Fields of TrainConfig that determine the images of a run (_DATA), and fields that determine the features that a frozen
# model computes from these images (_BASE).
_DATA = (
    *("data", "data_root", "allow_non_commercial", "model", "image_size", "normalization"),
    *("data_seed", "max_test"),
)
_BASE = (*_DATA, "checkpoint", "pretrained", "amp", "seed")


def execute(stage: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Execute one run.

    Args:
        stage: "search" (train on the train split, and evaluate the last epoch on the validation split) or "final"
            (train on both splits, and test once).
        fields: fields of ``TrainConfig``. ``method`` may also be the name of a trivial predictor
            (:data:`efft_lab.compare.suite.TRIVIAL`).

    Returns:
        The result of the run: accuracies from 0 to 1 (None if they were not measured), parameter counts, seconds and
        the configuration. If training diverged, ``failed`` gives the reason, and there are no accuracies.
    """
    return execute_together(stage, [fields])[0]


def execute_together(stage: str, runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Execute one run, or several runs that are trained in one pass through their common backbone.

    If several runs cannot be trained together, or the training of one of them diverges, all of them are trained one
    after another.

    Args:
        stage: see :func:`execute`.
        runs: the fields of ``TrainConfig`` of each run.

    Returns:
        The result of each run, as :func:`execute` returns it. The seconds are divided equally among the runs. If they
        were trained together, ``together`` is their number.
    """
    started, used = time.perf_counter(), time.process_time()
    method = runs[0]["method"]
    trivial = {"method": "linear"} if method in TRIVIAL else {}
    configs = [TrainConfig.from_dict({**fields, **trivial}) for fields in runs]
    tasks = [_task(config) for config in configs]
    results = _train_together(stage, configs, tasks) if len(configs) > 1 else None
    if results is None:
        each = zip(configs, tasks, strict=True)
        results = [_predict(method, task) if trivial else _train(stage, config, task) for config, task in each]
    took = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}
    cost = {name: round(value / len(runs), 2) for name, value in took.items()}
    return [
        {**result, "group": task.info.group, "test_images": len(task.test), **cost}
        for result, task in zip(results, tasks, strict=True)
    ]


def _predict(name: str, task: Any) -> dict[str, Any]:
    """Return the result of a trivial predictor."""
    from efft_lab.data import nearest_neighbors, trivial_baselines

    accuracy = (nearest_neighbors(task) if name == "knn" else trivial_baselines(task)[name]) / 100
    return {"test_accuracy": accuracy, "trainable_parameters": 0, "head_parameters": 0}


def _train(stage: str, config: TrainConfig, task: Any) -> dict[str, Any]:
    """Train a model in a temporary folder, which is deleted afterwards, and return the result."""
    model = None
    if METHODS[config.method].head_alone and config.drop_path == 0:
        task = _features(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = Head(task.width, task.classes)
    if stage == "search":
        task = WithoutTest(task)
    with tempfile.TemporaryDirectory(prefix="efft-compare-") as folder:
        try:
            result = run(config, folder, model=model, task=task, progress=False).summary
        except FloatingPointError as error:
            return {"failed": str(error), "config": config.to_dict()}
        return _result(stage, config, result, Path(folder))


def _train_together(stage: str, configs: Sequence[TrainConfig], tasks: Sequence[Any]) -> list[dict[str, Any]] | None:
    """Train several models in temporary folders, which are deleted afterwards, and return the results.

    Return None if the models cannot be trained together, or if the training of one of them diverges.
    """
    tasks = [WithoutTest(task) if stage == "search" else task for task in tasks]
    n = len(configs)
    with tempfile.TemporaryDirectory(prefix="efft-compare-") as folder:
        folders = [Path(folder) / str(i) for i in range(n)]
        try:
            found = run_together(configs, folders, tasks=tasks, progress=False)
        except (FloatingPointError, ValueError, RuntimeError) as error:
            print(f"trained one after another instead of together: {error}", file=sys.stderr, flush=True)
            return None
        results = []
        for config, result, own in zip(configs, found, folders, strict=True):
            of_run = _result(stage, config, result.summary, own)
            # The clock of a run includes the images of all others.
            results.append({**of_run, "images_per_second": round(n * of_run["images_per_second"], 2), "together": n})
        return results


def _result(stage: str, config: TrainConfig, result: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the part of the result of a run in ``folder`` that is recorded."""
    epochs = read_metrics(folder / "metrics.jsonl", "epoch")
    kept = ("trainable_parameters", "head_parameters", "factor_parameters", "updates")
    return {
        "val_accuracy": epochs[-1]["val_accuracy"],
        "test_accuracy": None if stage == "search" else result["test_accuracy"],
        "train_loss": epochs[-1]["loss"],
        "images_per_second": round(epochs[-1]["images_per_second"], 2),
        **{name: result[name] for name in kept},
        "config": config.to_dict(),
    }


@lru_cache(maxsize=2)
def _load(values: tuple[Any, ...]) -> Any:
    return build.load_task(TrainConfig(**dict(zip(_DATA, values, strict=True))))


def _task(config: TrainConfig) -> Any:
    """Return the data of a run. The last two data sets stay in memory for the following runs."""
    return _load(tuple(getattr(config, name) for name in _DATA))


@lru_cache(maxsize=1)
def _load_features(values: tuple[Any, ...]) -> _Features:
    config = TrainConfig(**dict(zip(_BASE, values, strict=True)), drop_path=0.0)
    return _Features(build.create_model(config, 0), _task(config), config.amp)


def _features(config: TrainConfig) -> _Features:
    """Return the task with the features of the frozen model, the inputs of its classifier, instead of images.

    The last features stay in memory, because all points of a grid need the same features.
    """
    return _load_features(tuple(getattr(config, name) for name in _BASE))


class _Features(FeatureTask):
    @property
    def width(self) -> int:
        return int(self.train.tensors[0].shape[1])


def choose_attention() -> None:
    """Select the implementation of attention for this process.

    On CPUs, the backward pass of PyTorch's fused attention in bf16 takes 4 times as long as that of attention by
    separate matrix products (measured with 26 tokens).
    """
    if not torch.cuda.is_available():
        torch.backends.cuda.enable_flash_sdp(False)


def main() -> None:
    """Answer every line of the standard input.

    When the standard input is closed, the process ends immediately, even during a run. The standard input is also
    closed when the process that started this one is killed.
    """
    choose_attention()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # everything that training prints goes to stderr, and only answers go to stdout
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        job = json.loads(lines.get())
        print(job["name"], file=sys.stderr, flush=True)
        answer: dict[str, Any]
        try:
            answer = {"results": execute_together(job["stage"], job["configs"])}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
