"""Other ways to fine-tune a frozen ViT, to compare with: those that are no update of a weight, and LoRA of `peft`.

One file a method. Each has one function `apply(model, **settings)` that changes a timm ViT in place, freezes it, and
leaves trainable what the method trains and the classifier. The parts it adds hang on the modules they act on, through
hooks, so the names and the forward of the base stay as they are.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from efft.baselines import adapter, adaptformer, bitfit, peft_lora, ssf, vpt

#: Name of a method to the function that applies it.
METHODS: dict[str, Callable[..., nn.Module]] = {
    "adapter": adapter.apply,
    "adaptformer": adaptformer.apply,
    "bitfit": bitfit.apply,
    "peft_lora": peft_lora.apply,
    "ssf": ssf.apply,
    "vpt_deep": vpt.apply,
}


def names() -> list[str]:
    """Names of the methods."""
    return list(METHODS)


def apply(name: str, model: nn.Module, settings: dict[str, Any]) -> nn.Module:
    """Applies a method by name, in place.

    Raises:
        ValueError: a setting that the method does not have, or a model that it does not fit.
    """
    import inspect

    known = list(inspect.signature(METHODS[name]).parameters)[1:]
    unknown = sorted(settings.keys() - set(known))
    if unknown:
        raise ValueError(f"method {name!r} has no setting {', '.join(unknown)}; it has: {', '.join(known) or 'none'}")
    return METHODS[name](model, **settings)
