"""Training: one configuration, one function, one folder per run.

    from efft.train import TrainConfig, run

    result = run(TrainConfig(data="mnist5k", epochs=10, schedule_per="update"), out="runs/mnist")
    print(result.summary["test_accuracy"])

Importing this package loads neither timm nor accelerate; `run` does.
"""

from efft.train.checkpoint import CheckpointError
from efft.train.config import TrainConfig
from efft.train.metrics import read_metrics
from efft.train.runner import RunResult, run
from efft.train.segmentation import Segmenter

__all__ = ["CheckpointError", "RunResult", "Segmenter", "TrainConfig", "read_metrics", "run"]
