"""Train a model as a configuration describes, and write the configuration, metrics, weights and result to a folder.

    from efft_lab.train import TrainConfig, run

    result = run(TrainConfig(data="mnist5k", epochs=10, schedule_per="update"), out="runs/mnist")
    print(result.summary["test_accuracy"])

Importing this package imports neither timm nor accelerate. They are imported when :func:`run` is called.
"""

from __future__ import annotations

from efft_lab.train.config import TrainConfig
from efft_lab.train.folder import CheckpointError, read_metrics
from efft_lab.train.segmentation import Segmenter
from efft_lab.train.together import run_together
from efft_lab.train.trainer import RunResult, run

__all__ = ["CheckpointError", "RunResult", "Segmenter", "TrainConfig", "read_metrics", "run", "run_together"]
