"""Baselines: other ways to fine-tune a frozen ViT that are not updates of its weights, and LoRA of `peft`.

Each file has one function ``apply(model, **settings)`` that changes a timm ViT in place, freezes it, and leaves
trainable what the baseline trains and the classifier. The parts that it adds are attached to the modules they act on
through hooks, so the names and the forward of the base model stay as they are.

To add a baseline, write such a file, decorate its function with ``@baseline("name")``, and add the file to the import
below. ``TrainConfig``, the folder of a run and comparisons find it in the registry.
"""

from __future__ import annotations

from efft_lab.baselines import adapter, adaptformer, bitfit, peft_lora, ssf, vpt  # noqa: F401  # registers them
from efft_lab.baselines.registry import METHODS, apply, check, names, settings_of

__all__ = ["METHODS", "apply", "check", "names", "settings_of"]
