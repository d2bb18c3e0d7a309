"""Fine-tune a frozen ViT with baselines: methods that do not update its weight matrices, and LoRA from `peft`.

Each file has one function ``apply(model, **settings)``, which changes a timm ViT in place and freezes all its
parameters except the classifier and the parameters of the baseline. Added parts are attached to the modules of the base
model through hooks. The parameter names and the forward methods of the base model therefore do not change.

To add a baseline, write such a file, decorate the function with ``@baseline("name")``, and add the file to the import
below. ``TrainConfig``, the folder of a run and comparisons find the baseline in the registry.
"""

from __future__ import annotations

from efft_lab.baselines import adapter, adaptformer, bitfit, peft_lora, ssf, vpt  # noqa: F401  # importing a file registers its baseline
from efft_lab.baselines.registry import METHODS, apply, check, names, settings_of

__all__ = ["METHODS", "apply", "check", "names", "settings_of"]
