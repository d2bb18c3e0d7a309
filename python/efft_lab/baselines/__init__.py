"""Provide baselines for fine-tuning a frozen ViT: LoRA from `peft`, and methods that do not update weight matrices.

Each baseline is a file with one function ``apply(model, **settings)``. The function changes a timm ViT in place. It
freezes all parameters except the classifier and the parameters that the baseline trains. LoRA from `peft` replaces the
adapted layers by layers of `peft`. BitFit adds no modules. All other baselines attach new modules to the modules of the
base model with hooks. The parameter names and the forward methods of the base model then do not change.

To add a baseline, write such a file, decorate the function with ``@baseline("name")``, and add the file to the import
below. ``TrainConfig``, the folder of a run and comparisons find the baseline in the registry.
"""

from __future__ import annotations

from efft_lab.baselines import adapter, adaptformer, bitfit, peft_lora, ssf, vpt  # noqa: F401  # importing a file registers its baseline
from efft_lab.baselines.registry import METHODS, apply, check, names, settings_of

__all__ = ["METHODS", "apply", "check", "names", "settings_of"]
