"""Load backbone weights from a file.

The file is an ``.npz`` file of the original ViT code in JAX, or a state dict in an ``.npz``, ``.pth``, ``.pt`` or
``.safetensors`` file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

_JAX_MARK = "embedding/kernel"  # end of a name that only JAX checkpoints of ViT contain
_SUFFIXES = (".npz", ".pth", ".pt", ".safetensors")


def load_backbone(model: nn.Module, path: str | Path) -> None:
    """Load backbone weights from a file into a timm model without a classifier.

    A classifier in the file is ignored. All other names in the file must be names in the model's state dict, or names
    that timm converts to such names. Position embeddings and tables of relative positions are resized by timm's
    functions.

    Args:
        model: timm model created with ``num_classes=0``.
        path: an ``.npz`` file (a JAX checkpoint such as ``ViT-B_16.npz``, or a state dict), a ``.pth`` or ``.pt`` file
            (a state dict, possibly under the key ``model`` or ``state_dict``; it is read with ``weights_only=True``),
            or a ``.safetensors`` file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the suffix is unknown, the file cannot be read, or keys or shapes do not fit the model.
    """
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"checkpoint {path} has suffix {path.suffix!r}; expected one of {', '.join(_SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        state = _read(path)
    except Exception as error:  # a damaged archive or pickle can raise nearly anything
        raise ValueError(f"checkpoint {path} cannot be read: {error}") from error
    if any(name.endswith(_JAX_MARK) for name in state):
        _load_jax(model, path)
        return
    try:
        state = _for_model(model, state)
    except Exception as error:  # timm's conversions raise many types of errors if names or shapes differ
        raise ValueError(f"{path} does not fit {type(model).__name__}: {error!r}") from error
    load_strict(model, state, str(path))


def load_strict(model: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Copy a state dict into a model. If they do not match, the error lists the differences.

    Args:
        model: any module.
        state: tensors by parameter and buffer name.
        source: origin of the state dict, for the error message.

    Raises:
        ValueError: keys are missing or unexpected, or shapes differ. The message gives the number of such keys and
            names the first five.
    """
    own = model.state_dict()
    shapes = [
        f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
        for name in own.keys() & state.keys()
        if state[name].shape != own[name].shape
    ]
    problems = [
        f"{len(names)} {what} ({_first(names)})"
        for what, names in (
            ("missing keys", own.keys() - state.keys()),
            ("unexpected keys", state.keys() - own.keys()),
            ("keys of another shape", shapes),
        )
        if names
    ]
    if problems:
        raise ValueError(f"{source} does not fit {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(state)


def _first(names: Iterable[str], limit: int = 5) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:limit]) + (", ..." if len(ordered) > limit else "")


def _read(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".npz":
        import numpy as np

        with np.load(path, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(error) from error
    content = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError("expected a state dict, possibly under the key 'model' or 'state_dict', got none")
    return content


def _load_jax(model: nn.Module, path: Path) -> None:
    load = getattr(model, "load_pretrained", None)
    if load is None:
        raise ValueError(f"{path} is a JAX ViT checkpoint, which {type(model).__name__} cannot load")
    try:
        load(str(path))
    except (KeyError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{path} is a JAX ViT checkpoint that does not fit {type(model).__name__}: {error}") from error


def _for_model(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert a state dict with timm's function for the family of the model, and remove the classifier."""
    from timm.models import clean_state_dict

    state = clean_state_dict(state)
    adjust = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adjust is not None:
        state = adjust(state, model)
    config: Any = model.pretrained_cfg
    classifier = config["classifier"]
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    return {name: value for name, value in state.items() if not name.startswith(tuple(f"{h}." for h in heads))}
