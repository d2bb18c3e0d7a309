"""Train many fine-tuning runs of one ViT together, as a stack.

A run of the suite ``local_long`` takes 620 steps of only 272 tokens. A GPU would therefore mostly wait for the launches
of its kernels. In a stack, K runs that train the same tensors advance together. Their values, tasks, seeds and learning
rates may differ. For products with frozen weights, the tokens of all runs form one matrix. Products with trained
weights are batched, and AdamW updates one tensor ``[K, parameters]``.

Each run starts with the same parameters as in :func:`efft_lab.train.run`, because the library creates and adapts the
model for its seed. The order of the images, the schedule and the arithmetic are also those of the trainer. Only the
forward pass of timm's ViT and AdamW are implemented again here. A test compares the results with those of the trainer.
"""

from efft_lab.studies.stacked.stack import Stack, schedule
from efft_lab.studies.stacked.start import Start

__all__ = ["Stack", "Start", "schedule"]
