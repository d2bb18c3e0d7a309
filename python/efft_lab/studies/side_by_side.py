"""Compare EFFT2, LoRA of ``peft`` and other methods on any model and task.

The learning rate of each method is chosen on validation images. The studies ``text`` and ``convolutions`` use this
module; other studies use only :func:`method`. A row is one line of a result file: the result of one method with one
seed.
"""

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
"""Learning rates to choose from, for recipes without an entry ``rates``. The linear probe uses `PROBE_RATES`."""
PROBE_RATES = (1e-3, 1e-2, 1e-1)
LORA = "peft_lora_elsewhere"
"""Name under which :func:`rows` registers :func:`lora` as a training method."""


def lora(model: nn.Module, layers: str) -> None:
    """Apply LoRA of ``peft`` with rank 8 in place. The classifier stays trainable.

    Args:
        model: a model with a known classifier.
        layers: regular expression that must match the full name of a layer.
    """
    import peft

    peft_lora.inject(model, peft.LoraConfig(r=8, lora_alpha=8, target_modules=layers))


def rows(
    name: str,
    tasks: Mapping[int, Any],
    create: Callable[[int], nn.Module],
    recipes: Mapping[str, Mapping[str, Any]],
    layers: str,
) -> Iterator[dict[str, Any]]:
    """Train every method with every seed, and yield one row per seed and method.

    The learning rate of a method is chosen with the first seed and then used for all seeds. The learning rate of the
    linear probe is chosen separately for each seed.

    Args:
        name: name of the task, for the rows.
        tasks: maps each seed to the task with the training data of that seed.
        create: function that returns the pretrained model with a new classifier for a number of classes.
        recipes: maps the title of each method to the fields of `TrainConfig` that differ from `RECIPE`. The additional
            entry ``rates`` may list the learning rates to choose from.
        layers: the layers that LoRA adapts, see :func:`lora`.
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
    """Register a training method under a name for the duration of a ``with`` block.

    If a method of that name is already registered, it is replaced for this time.
    """
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
    """Append each row to ``STUDY.jsonl`` and print it as soon as it is computed. At the end, print the mean accuracies.

    Args:
        study: name of the result file.
        rows: rows of :func:`rows`, and other rows with the same fields ``row``, ``seed`` and ``test_accuracy``.
        results: folder of the file; by default, ``benchmarks/results``.
    """
    accuracies: dict[str, list[float]] = {}
    for row in rows:
        append(study, [row], results)
        accuracies.setdefault(row["row"], []).append(row["test_accuracy"])
        print(f"{row['row']:<18}seed {row['seed']}: {row['test_accuracy']:.1%}", flush=True)
    for name, values in accuracies.items():
        print(f"{name:<18}mean of {len(values)}: {fmean(values):.1%}")
