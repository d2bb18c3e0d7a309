"""Train several runs in one pass through the frozen backbone that they share (``efft.SharedBackbone``).

Every run keeps its own model, data, random numbers, optimizer, schedule and folder. Its result is that of a run alone,
except that frozen matrix products with more rows may round differently. On a GPU that a small model does not fill,
several runs take little more time than one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import efft
from efft_lab.train.build import make_accelerator
from efft_lab.train.config import TrainConfig
from efft_lab.train.folder import open_folder
from efft_lab.train.methods import METHODS
from efft_lab.train.trainer import RunResult, Trainer

#: The fields of ``TrainConfig`` in which runs that are trained together may differ.
MAY_DIFFER = ("seed", "data_seed", "lr", "weight_decay")


def reason_against(configs: Sequence[TrainConfig]) -> str | None:
    """Return why runs cannot be trained together, or None if they can."""
    first = configs[0]
    if not METHODS[first.method].shares_backbone:
        return f"method {first.method!r} does not keep a frozen backbone that models can share"
    if first.drop_path > 0:
        return f"drop_path must be 0, because the models would share its random numbers, got {first.drop_path}"
    if first.amp == "fp16":
        return "with amp='fp16', each run scales its loss by itself; use 'bf16' or 'no'"
    if first.prune_at is not None:
        return "prune_at reduces the ranks of each model by itself; leave it out"
    if not first.pretrained and first.checkpoint is None and len({config.seed for config in configs}) > 1:
        return "with random weights, every seed has another backbone; name pretrained weights"
    expected = first.to_dict()
    for config in configs[1:]:
        differing = [n for n, value in config.to_dict().items() if n not in MAY_DIFFER and value != expected[n]]
        if differing:
            return f"runs may differ only in {', '.join(MAY_DIFFER)}, but these differ in {', '.join(differing)}"
    return None


def run_together(
    configs: Sequence[TrainConfig],
    folders: Sequence[str | Path],
    *,
    models: Sequence[nn.Module] | None = None,
    tasks: Sequence[Any] | None = None,
    progress: bool = True,
) -> list[RunResult]:
    """Train several runs in one pass through their backbone. Each run writes its own folder, as ``run`` does.

    No checkpoints are written, so an interrupted training cannot be continued. The seconds in a folder are those of all
    runs together.

    Args:
        configs: the configurations, which may differ only in :data:`MAY_DIFFER`.
        folders: a new folder for each run.
        models: models to train instead of those that the configurations name. They need equal frozen weights.
        tasks: the data of each run, instead of the data sets that the configurations name.
        progress: whether to show a progress bar for each run.

    Raises:
        ValueError: there is not one folder of its own (and one model or task, if given) for each run, or the runs
            cannot be trained together; the message says why.
        FileExistsError: a folder already contains a run.
        FloatingPointError: a recorded loss of one run is not finite. All runs end with it.
        RuntimeError: the backbone draws random numbers in training.
    """
    paths = [Path(folder) for folder in folders]
    for name, values in (("folders", set(paths)), ("models", models), ("tasks", tasks)):
        if not configs or (values is not None and len(values) != len(configs)):
            got = 0 if values is None else len(values)
            raise ValueError(f"run_together: expected {name} for {len(configs)} runs (at least 1), got {got} different")
    reason = reason_against(configs)
    if reason is not None:
        raise ValueError(f"these runs cannot be trained together: {reason}")
    accelerator = make_accelerator(configs[0])
    if accelerator.num_processes > 1:
        raise ValueError(f"run_together needs a single process, got {accelerator.num_processes}")
    trainers: list[Trainer] = []

    def members() -> Iterator[tuple[str, nn.Module]]:
        for i, (config, folder) in enumerate(zip(configs, paths, strict=True)):
            open_folder(folder, config, False, False, True)
            model = None if models is None else models[i]
            task = None if tasks is None else tasks[i]
            trainer = Trainer(config, folder, accelerator, model, task, progress, checkpoints=False)
            trainers.append(trainer)
            # The backbone is built from the model without accelerate's wrapper of its forward method.
            yield str(i), accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)

    try:
        shared = efft.SharedBackbone(members(), seeds={str(i): config.seed for i, config in enumerate(configs)})
        for trainer in trainers:
            trainer.model = accelerator.prepare_model(trainer.plain)
        batches = [len(trainer.batches) for trainer in trainers]
        if len(set(batches)) > 1:
            raise ValueError(f"these runs cannot be trained together: they have {batches} batches per epoch")
        while trainers[0].epoch < configs[0].epochs:
            for step in zip(*(trainer.epoch_batches() for trainer in trainers), strict=True):
                _step(shared, trainers, step)
        return [RunResult(trainer.finish(), trainer.plain) for trainer in trainers]
    finally:
        for trainer in trainers:
            trainer.close()


def _step(shared: nn.Module, trainers: Sequence[Trainer], batches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Make one update of every run."""
    from accelerate.utils import convert_outputs_to_fp32

    accelerator = trainers[0].accelerator
    images = {str(i): batch for i, (batch, _) in enumerate(batches)}
    with accelerator.autocast():
        outputs = convert_outputs_to_fp32(shared)(images)
    labels = [each for _, each in batches]
    losses = [
        trainer.goal.loss(output, each)
        for trainer, output, each in zip(trainers, outputs.values(), labels, strict=True)
    ]
    accelerator.backward(torch.stack(losses).sum())
    for trainer, output, loss, each in zip(trainers, outputs.values(), losses, labels, strict=True):
        trainer.update_weights(output, loss, each)
