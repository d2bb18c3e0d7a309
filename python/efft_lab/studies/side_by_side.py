"""Compare EFFT2, LoRA of ``peft`` and others on any model and task; learning rates are chosen by validation."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from efft_lab.baselines import peft_lora
from efft_lab.record import append, machine_facts
from efft_lab.train import TrainConfig, run
from efft_lab.train.methods import METHODS, Changed, Method
from efft_lab.train.probe import WithoutTest, linear_probe

RECIPE: dict[str, Any] = {"epochs": 3, "batch_size": 16, "schedule_per": "update", "protocol": "final"}
RATES = (1e-3, 3e-3)
"""Learning rates to choose from, unless a recipe has its own ``rates``; the probe tries `PROBE_RATES` for each seed."""
PROBE_RATES = (1e-3, 1e-2, 1e-1)
LORA = "peft_lora_elsewhere"
"""The name of :func:`lora` as a method, while :func:`rows` trains."""


def lora(model: nn.Module, layers: str) -> None:
    """Apply LoRA of ``peft``, rank 8, in place to the layers whose whole name matches; the classifier trains too."""
    import peft

    peft_lora.inject(model, peft.LoraConfig(r=8, lora_alpha=8, target_modules=layers))


def rows(
    name: str,
    tasks: Mapping[int, Any],
    create: Callable[[int], nn.Module],
    recipes: Mapping[str, Mapping[str, Any]],
    layers: str,
) -> Iterator[dict[str, Any]]:
    """Yield one row per seed and method.

    Args:
        name: name of the task, for the rows.
        tasks: for each seed, the task with that seed's training data.
        create: turns a number of classes into the pretrained model with a new classifier.
        recipes: for each row's title, the fields of `TrainConfig` in which it differs from `RECIPE`, and its ``rates``.
        layers: the layers of the LoRA row, see :func:`lora`.
    """
    chosen: dict[str, float] = {}
    for seed, task in tasks.items():
        for title, recipe in recipes.items():
            config = {**RECIPE, "seed": seed, **recipe}
            rates = config.pop("rates", RATES)
            with method(LORA, Changed(lambda model: lora(model, layers))):
                if title not in chosen and config["method"] != "linear":
                    trials = [TrainConfig(**{**config, "lr": lr, "protocol": "select"}) for lr in rates]
                    best = max(trials, key=lambda trial: _train(trial, WithoutTest(task), create)["val_accuracy"])
                    chosen[title] = best.lr
                summary = _train(TrainConfig(**{**config, "lr": chosen.get(title, rates[0])}), task, create)
            yield {
                "task": name,
                "row": title,
                "seed": seed,
                "test_accuracy": summary["test_accuracy"],
                "parameters": summary["trainable_parameters"] - summary["head_parameters"],
                "lr": summary["config"]["lr"],
                "seconds": summary["seconds"],
                **machine_facts(),
            }


@contextmanager
def method(name: str, temporary: Method) -> Iterator[None]:
    """Put a method into the registry, or replace the one of that name, for the duration of the context."""
    before = dict(METHODS)
    METHODS[name] = temporary
    try:
        yield
    finally:
        METHODS.clear()
        METHODS.update(before)


def _train(config: TrainConfig, task: Any, create: Callable[[int], nn.Module]) -> dict[str, Any]:
    torch.manual_seed(config.seed)
    model = create(task.classes)
    with tempfile.TemporaryDirectory() as out:
        if config.method == "linear":
            return linear_probe(config, out, model, task, PROBE_RATES).summary
        return run(config, out, model=model, task=task, progress=False).summary


def record(study: str, rows: Iterable[dict[str, Any]], results: Path | None) -> None:
    """Append each row to ``STUDY.jsonl`` immediately and print it. At the end, print the mean accuracies.

    Args:
        study: name of the result file.
        rows: rows of :func:`rows`, and others in the same form.
        results: folder of the file; by default the repository's.
    """
    accuracies: dict[str, list[float]] = {}
    for row in rows:
        append(study, [row], results)
        accuracies.setdefault(row["row"], []).append(row["test_accuracy"])
        print(f"{row['row']:<18}seed {row['seed']}: {row['test_accuracy']:.1%}", flush=True)
    for name, values in accuracies.items():
        print(f"{name:<18}mean of {len(values)}: {fmean(values):.1%}")
