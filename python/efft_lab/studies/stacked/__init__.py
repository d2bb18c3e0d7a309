"""Many fine-tuning runs of one ViT at once: the frozen weights are read once for all of them.

A run of the suite ``local_long`` takes 620 steps of 272 tokens, so a GPU waits for its launches. Here ``K`` runs that
train the same tensors (other values, tasks, seeds, rates) advance together: products with frozen weights take all runs'
tokens as one matrix, products with trained ones are batched, and AdamW acts on one tensor ``[K, parameters]``.

What each run starts from is what :func:`efft_lab.train.run` would start from: the library's own model, adapted by the
library for its seed. The order of the images, the schedule and the arithmetic are the trainer's too; the forward pass
is written out here for timm's ViT, and a test compares it with the library's.
"""

from efft_lab.studies.stacked.stack import Stack, schedule
from efft_lab.studies.stacked.start import Start

__all__ = ["Stack", "Start", "schedule"]
