"""Test the study of convolutional networks: its pretraining, the adapted layers, and its result rows.

A row is a line of the result file, with the result of one method and one seed.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import efft
import efft_lab.data
from efft_kernels.nn.conv import EfftConv2d
from efft_lab.data.task import ROLES, ArrayImages, Preprocess, Split
from efft_lab.studies import convolutions, side_by_side
from efft_lab.train.methods import METHODS

#: d_in (9 times the input channels), d_out, and how many 3x3 kernels of ResNet-18 have these sizes.
SHAPES = (
    (576, 64, 4),
    (576, 128, 1),
    (1152, 128, 3),
    (1152, 256, 1),
    (2304, 256, 3),
    (2304, 512, 1),
    (4608, 512, 3),
)
PARAMETERS = {
    "EFFT2": sum(8 * (d_in + d_out) + n * 8 * 8 for d_in, d_out, n in SHAPES),
    "LoRA (peft)": sum(n * 8 * (d_in + d_out) for d_in, d_out, n in SHAPES),
    "full fine-tuning": 11_176_512,
    "linear probe": 0,
}


class Bars:
    """Provide noisy images of 16 x 16 pixels, each with a horizontal or a vertical bar."""

    classes = 2

    def __init__(self, size: int) -> None:
        draw = torch.Generator().manual_seed(size)
        labels = torch.arange(size) % 2
        bars = torch.zeros(size, 3, 16, 16)
        bars[labels == 0, :, 6:10], bars[labels == 1, :, :, 6:10] = 2.0, 2.0
        data = TensorDataset(bars + 0.1 * torch.randn(bars.shape, generator=draw), labels)
        self.train = self.val = self.trainval = self.test = data


def test_the_first_training_sees_the_whole_pool() -> None:
    pool = ArrayImages(np.zeros((30, 8, 8), np.uint8), np.arange(30) % 3)
    few = {role: Split(pool, np.arange(5)) for role in ROLES}
    task = efft_lab.data.TaskData(efft_lab.data.TaskInfo("few", None, 3, "", ""), few, Preprocess(8, "none"))
    whole = convolutions.Whole(task)
    assert whole.train.labels.tolist() == pool.labels.tolist()
    assert whole.trainval is whole.train
    assert whole.test is task.test


@pytest.mark.slow
def test_rows_of_all_methods() -> None:
    rows = list(convolutions.study(Bars(96), {1: Bars(48)}, epochs=4))
    assert {row["row"]: row["parameters"] for row in rows} == PARAMETERS
    assert {(row["task"], row["source"], row["seed"]) for row in rows} == {("animal-silhouettes", "fashion-mnist", 1)}
    assert rows[0]["source_accuracy"] > 0.9
    assert all(row["test_accuracy"] > 0.9 for row in rows), rows
    assert {row["lr"] for row in rows if row["row"] == "full fine-tuning"} < {1e-4, 3e-4}
    assert side_by_side.LORA not in METHODS


def test_lora_and_efft_adapt_the_same_kernels() -> None:
    model = convolutions.resnet(3)
    side_by_side.lora(model, convolutions.LAYERS)
    lora = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    other = efft.apply(convolutions.resnet(3), efft.EfftConfig.auto(rank=2, targets=[convolutions.LAYERS]))
    assert lora == {name for name, module in other.named_modules() if isinstance(module, EfftConv2d)}
    assert len(lora) == 16
