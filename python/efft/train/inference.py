"""A model over a whole data set, without gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


def device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def collect(
    function: Callable[[Tensor], Tensor], data: Dataset[Any], batch_size: int = 256, amp: str = "no", title: str = ""
) -> tuple[Tensor, Tensor]:
    """Outputs of a function for every image.

    Args:
        function: of images [batch, 3, size, size] on `device()`.
        data: map-style, of (image [3, size, size], label).
        batch_size: images per step.
        amp: autocast type: "no", "bf16" or "fp16".
        title: of the progress bar.

    Returns:
        Outputs [n, ...] and labels [n], on the CPU.
    """
    from tqdm.auto import tqdm

    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    outputs, labels = [], []
    for images, targets in tqdm(DataLoader(data, batch_size), title, leave=False, dynamic_ncols=True):
        with torch.autocast(device().type, dtype, enabled=amp != "no"):
            outputs.append(function(images.to(device())).float().cpu())
        labels.append(targets)
    return torch.cat(outputs), torch.cat(labels)


def predict(model: nn.Module, data: Dataset[Any], **options: Any) -> tuple[Tensor, Tensor]:
    """Predicted classes [n] and labels [n]; `options` as for `collect`.

    Args:
        model: in evaluation mode; it is moved to `device()`.
        data: map-style, of (image [3, size, size], label).
        options: batch_size, amp, title.
    """
    logits, labels = collect(model.to(device()), data, **options)
    return logits.argmax(-1), labels
