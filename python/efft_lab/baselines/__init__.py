"""Other ways to fine-tune a frozen ViT, to compare with: those that are no update of a weight, and LoRA of `peft`.

One file a method. Each has one function `apply(model, **settings)` that changes a timm ViT in place, freezes it, and
leaves trainable what the method trains and the classifier. The parts it adds hang on the modules they act on, through
hooks, so the names and the forward of the base stay as they are.
"""

from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from torch import nn

from efft_lab import typed
from efft_lab.baselines import adapter, adaptformer, bitfit, peft_lora, ssf, vpt

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


def settings_of(name: str) -> dict[str, Any]:
    """Name of each setting of a method to its type."""
    hints = get_type_hints(METHODS[name])
    return {setting: hint for setting, hint in hints.items() if setting not in ("model", "return")}


def check(name: str, settings: Mapping[str, Any]) -> None:
    """Refuses settings that a method cannot have, whatever the model.

    Raises:
        ValueError: one that the method does not have, or a value of the wrong type.
    """
    known = settings_of(name)
    unknown = sorted(settings.keys() - known.keys())
    if unknown:
        raise ValueError(f"method {name!r} has no setting {', '.join(unknown)}; it has: {', '.join(known) or 'none'}")
    for setting, value in settings.items():
        typed.check(f"{setting} of method {name!r}", value, known[setting])
        if known[setting] is int and value < 1:
            raise ValueError(f"{setting} of method {name!r} must be at least 1, got {value}")


def apply(name: str, model: nn.Module, settings: dict[str, Any]) -> nn.Module:
    """Applies a method by name, in place.

    Raises:
        ValueError: settings that `check` refuses, or a model that the method does not fit.
    """
    check(name, settings)
    return METHODS[name](model, **settings)
