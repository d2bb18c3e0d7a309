"""Train a model from a configuration and write everything about the run to a folder.

    from efft_lab.train import TrainConfig, run

    result = run(TrainConfig(data="mnist5k", epochs=10, schedule_per="update"), out="runs/mnist")
    print(result.summary["test_accuracy"])

Importing this package loads neither timm nor accelerate; :func:`run` does.
"""

from __future__ import annotations

from efft_lab.train.config import TrainConfig
from efft_lab.train.folder import CheckpointError, read_metrics
from efft_lab.train.segmentation import Segmenter
from efft_lab.train.trainer import RunResult, run

__all__ = ["CheckpointError", "RunResult", "Segmenter", "TrainConfig", "read_metrics", "run"]
