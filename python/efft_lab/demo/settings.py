"""Define the settings of the demo.

EFFT is trained with the default configuration of the library, and no setting is searched for these tasks. Only the
learning rate of the linear probe is selected on validation images.
"""

from __future__ import annotations

import torch

from efft.methods import EfftConfig
from efft_lab.record import processor_flags
from efft_lab.train.config import TrainConfig

TASKS = ("mnist5k", "count")
IMAGE_SIZE = 70  # gives 26 tokens; the demo then takes minutes on two CPU cores


def fast_bf16() -> bool:
    """Return whether the demo should use bf16 on this machine.

    The result is True on GPUs that support bf16 and on CPUs with bf16 dot-product instructions. On such a CPU, a
    training step of the demo took two thirds of the time in fp32. Other CPUs emulate bf16.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(processor_flags())


def efft_config(task: str, quick: bool) -> TrainConfig:
    """Return the training configuration for EFFT with the default of the library, :meth:`efft.EfftConfig.auto`."""
    return TrainConfig(
        data=task,
        image_size=IMAGE_SIZE,
        efft=EfftConfig.auto(),
        epochs=1 if quick else 8,
        batch_size=16,
        drop_path=0.0,
        schedule_per="update",
        log_every=5,
        amp="bf16" if fast_bf16() else "no",
    )


def probe_config(task: str, quick: bool) -> TrainConfig:
    """Return the configuration of the linear probe.

    The probe trains for many more epochs than EFFT. These epochs are fast, because the features of the frozen model are
    computed only once.
    """
    return TrainConfig(
        data=task,
        image_size=IMAGE_SIZE,
        method="linear",
        epochs=10 if quick else 60,
        batch_size=64,
        schedule_per="update",
        amp="bf16" if fast_bf16() else "no",
    )
