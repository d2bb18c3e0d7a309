"""Compute the outputs, predictions or statistics of a model for all images of a data set, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from efft_lab.train.goals import Goal


def device() -> torch.device:
    """Return the current GPU if one is available, and the CPU otherwise."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def _batches(
    function: Callable[[Tensor], Tensor], data: Dataset[Any], batch_size: int = 256, amp: str = "no", title: str = ""
) -> Iterator[tuple[Tensor, Tensor]]:
    from tqdm.auto import tqdm

    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    for images, targets in tqdm(DataLoader(data, batch_size), title, leave=False, dynamic_ncols=True):
        with torch.autocast(device().type, dtype, enabled=amp != "no"):
            outputs = function(images.to(device()))
        yield outputs.float(), targets


def collect(function: Callable[[Tensor], Tensor], data: Dataset[Any], **options: Any) -> tuple[Tensor, Tensor]:
    """Compute the outputs of a function for every image of a data set.

    Args:
        function: function that is called with images [batch, 3, size, size] on :func:`device`.
        data: map-style data set that returns (image [3, size, size], label).
        options: ``batch_size`` (number of images that are computed at a time, 256 by default), ``amp`` (number format
            for autocast: "no", "bf16" or "fp16", "no" by default) and ``title`` (title of the progress bar).

    Returns:
        Outputs in fp32 [n, ...] and labels [n, ...], on the CPU.
    """
    pairs = [(outputs.cpu(), targets) for outputs, targets in _batches(function, data, **options)]
    outputs, targets = zip(*pairs, strict=True)
    return torch.cat(outputs), torch.cat(targets)


def measure(model: nn.Module, data: Dataset[Any], goal: Goal, **options: Any) -> Tensor:
    """Compute the statistics of a goal (:mod:`efft_lab.train.goals`), summed over a data set.

    Args:
        model: model in evaluation mode; it is moved to :func:`device`.
        data: map-style data set that returns (image [3, size, size], label).
        goal: the goal for which the model was trained.
        options: same as for :func:`collect`.

    Returns:
        The sums, a one-dimensional tensor on the CPU.
    """
    batches = _batches(model.to(device()), data, **options)
    sums = [goal.statistics(goal.predict(outputs), targets.to(device())) for outputs, targets in batches]
    return torch.stack(sums).sum(0).cpu()


def predict(model: nn.Module, data: Dataset[Any], **options: Any) -> tuple[Tensor, Tensor]:
    """Return the predicted classes [n] and the labels [n] of a data set.

    Args:
        model: model in evaluation mode; it is moved to :func:`device`.
        data: map-style data set that returns (image [3, size, size], label).
        options: same as for :func:`collect`.
    """
    logits, labels = collect(model.to(device()), data, **options)
    return logits.argmax(-1), labels
