"""Find the task head of a model: the modules that are new for its task. They are trained in addition to the factors."""

from __future__ import annotations

from typing import Any

from torch import nn

from efft.hints import nearest

#: Attributes that usually hold the head, for models that do not declare their head in another way. The attributes in
#: one tuple belong together. Only the first tuple that contains an attribute of the model is used.
_USUAL = (
    ("classifier", "aux_classifier"),
    ("heads",),
    ("head",),
    ("fc", "AuxLogits", "aux1", "aux2"),
    ("score",),
    ("cls_classifier", "distillation_classifier"),
)


def find_head(model: nn.Module, config_head: list[str] | None) -> list[str]:
    """Return the names of the modules of the head: ``config_head``, or the modules that a search finds if it is None.

    For a task model of transformers, the head consists of all modules outside of the base model that its class
    declares. The output embeddings of a language model are pretrained, so they do not belong to a head. For a model of
    timm, the head is the classifier that the model declares. For any other model, the head consists of the children
    that have a usual name of a head. If there are none and the model has a child ``backbone``, it consists of all other
    children. If neither is the case, it is the head of a model of timm or transformers inside ``model``. The list is
    empty if no module that contains a matrix is found.

    Raises:
        ValueError: a given name is not a module of the model.
    """
    names = {module: name for name, module in model.named_modules()}  # the last name of a shared module
    if config_head is not None:
        known = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
        for name in config_head:
            if name not in known:
                near = nearest(name, known)
                parts = f"this {type(model).__name__} consists of {', '.join(model._modules) or 'no modules'}"
                hint = f"nearest: {', '.join(near)}" if near else parts
                raise ValueError(f"head: no module named {name!r}; {hint}")
        return list(config_head)
    found = _of_transformers(model) if _is_transformers(model) else _of_timm(model) or _of_root(model)
    # A model of a library may be inside of another model.
    for inside in [] if found or _is_bare(model) else list(model.modules())[1:]:
        found = found or _of_timm(inside) or ([] if _is_transformers(model) else _of_transformers(inside))
    chosen = {id(module) for module in found if _is_trainable(module)}
    head = [name for module, name in names.items() if name and id(module) in chosen]
    # A module without matrices (a temperature, a final norm) is not a head by itself.
    matrices = any(p.dim() > 1 for name in head for p in model.get_submodule(name).parameters())
    return head if matrices else []


def is_language_model(model: nn.Module) -> bool:
    """Return whether a model of transformers has output embeddings, which are pretrained like the rest of the model."""
    if not _is_transformers(model):
        return False
    embeddings: Any = model
    return embeddings.get_output_embeddings() is not None


def _of_transformers(model: nn.Module) -> list[nn.Module]:
    """Return the modules that a task model has in addition to its pretrained base or bases."""
    if not _is_transformers(model) or _is_bare(model) or is_language_model(model):
        return []
    base = getattr(model, str(model.base_model_prefix), None)
    children = list(model.children())
    if isinstance(base, nn.Module) and base is not model:
        bases = [base]
    else:
        bases = [child for child in children if _is_transformers(child)]
    inputs = _input_embeddings(model)
    beside = [child for child in children if child is not inputs and all(child is not b for b in bases)]
    if not bases or (base is None and 2 * _size(bases) < _size(children)):  # no child is the base
        return _of_root(model)
    return beside + [module for b in bases for module in _of_transformers(b)]  # a base may be a task model too


def _input_embeddings(model: Any) -> nn.Module | None:
    """Return the token embeddings, which an encoder-decoder holds next to its encoder and decoder."""
    try:
        embeddings: nn.Module | None = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # models of images and sound
        return None
    return embeddings


def _is_bare(model: nn.Module) -> bool:
    """Return whether a model of transformers has no task. Classes of models with a task are called XxxForTask."""
    return _is_transformers(model) and "For" not in type(model).__name__


def _of_timm(model: nn.Module) -> list[nn.Module]:
    """Return the classifier of a model of timm; distilled models have two."""
    if not hasattr(model, "get_classifier"):
        return []
    of_timm: Any = model
    classifier = of_timm.get_classifier()
    return [m for m in (classifier if isinstance(classifier, tuple) else [classifier]) if isinstance(m, nn.Module)]


def _of_root(model: nn.Module) -> list[nn.Module]:
    """Return the children that have a usual name of a head, or else all children except ``backbone``."""
    for attributes in _USUAL:
        named = [m for a in attributes if isinstance(m := getattr(model, a, None), nn.Module) and _is_trainable(m)]
        if named:
            return named
    backbone = getattr(model, "backbone", None)
    return [child for child in model.children() if child is not backbone] if isinstance(backbone, nn.Module) else []


def _is_transformers(model: nn.Module) -> bool:
    return hasattr(model, "base_model_prefix") and hasattr(model, "get_output_embeddings")


def _size(modules: list[nn.Module]) -> int:
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


def _is_trainable(module: nn.Module) -> bool:
    """Return whether a module has parameters. An Identity that replaces a head has none."""
    return next(module.parameters(), None) is not None
