"""Which modules are the task's own: trained beside the factors."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

#: Attributes that hold the classifier, the first that a model has; distilled models have a pair.
_HEADS = (("classifier",), ("head",), ("fc",), ("score",), ("cls_classifier", "distillation_classifier"))


def find_head(model: nn.Module, config_head: list[str] | None) -> list[str]:
    """Names of the modules trained beside the factors: those given, else the classifier (an empty list if there is
    none).

    Raises:
        ValueError: a given name is no module of the model.
    """
    names = [name for name, _ in model.named_modules() if name]
    if config_head is not None:
        for name in config_head:
            if name not in names:
                near = difflib.get_close_matches(name, names, 3)
                raise ValueError(f"head: no module named {name!r}; nearest: {', '.join(near) or 'none'}")
        return list(config_head)
    found: list[Any] = []
    for attributes in _HEADS:
        usual = [getattr(model, attribute, None) for attribute in attributes]
        found = found or [m for m in usual if isinstance(m, nn.Module) and next(m.parameters(), None) is not None]
    of_timm: list[Any] = [module for module in model.modules() if hasattr(module, "get_classifier")]
    if of_timm and (of_timm[0] is model or not found):  # the model, or one inside it
        classifier = of_timm[0].get_classifier()
        found = list(classifier) if isinstance(classifier, tuple) else [classifier]  # distilled models have a pair
    return [
        name
        for name, module in model.named_modules()
        if name and any(module is m for m in found) and next(module.parameters(), None) is not None
    ]
