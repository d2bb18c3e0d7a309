"""Advance many fine-tuning runs of one ViT at once: the frozen weights are read once for all of them.

A run of the suite ``local_long`` takes 620 steps of 272 tokens, so a GPU mostly waits for its launches. Here ``K`` runs
that train the same tensors advance together, with different values, tasks, seeds and rates. Products with frozen
weights read the tokens of all runs as one matrix. Products with trained weights are batched, and AdamW updates one
tensor ``[K, parameters]``.

Each run starts with the same parameters as in :func:`efft_lab.train.run`: the library creates and adapts the model for
that seed. The order of the images, the schedule and the arithmetic are also those of the trainer. Only the forward pass
is reimplemented here, for timm's ViT. A test compares it with the forward pass of the library.
"""

from efft_lab.studies.stacked.stack import Stack, schedule
from efft_lab.studies.stacked.start import Start

__all__ = ["Stack", "Start", "schedule"]
