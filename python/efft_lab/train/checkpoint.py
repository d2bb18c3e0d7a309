"""The state of a training run in one file that is either whole or the previous one, whenever the run is killed."""

import json
import random
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from efft.saving.files import replacing

_FORMAT = 2
# Fields of TrainConfig that only say how fast a run goes or how often it is saved.
_FREE_FIELDS = ("checkpoint_every", "workers")


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, or belongs to another run."""


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a state (tensors and plain Python values) to a file, atomically and durably."""
    with replacing(path) as file:
        torch.save({**state, "format": _FORMAT}, file)


def load(path: Path) -> dict[str, Any]:
    """Reads a file written by `save`, onto the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged or has another format.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("it is compressed")  # a small file could take all memory
            damaged = archive.testzip()  # torch does not check the sums it stores
        if damaged is not None:
            raise ValueError(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # a damaged archive or pickle can raise nearly anything
        raise CheckpointError(
            f"checkpoint {path} is damaged ({error}); start the run again with overwrite (--overwrite)"
        ) from error
    found = state.get("format") if isinstance(state, dict) else None
    if type(found) is not int or found != _FORMAT:
        raise CheckpointError(f"checkpoint {path} has format {found}; this version reads {_FORMAT}")
    if not isinstance(state.get("config"), dict):
        raise CheckpointError(f"checkpoint {path} does not hold the configuration of its run")
    return dict(state)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with names such as ``efft.rank``."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return out


def check_config(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuses to resume a run with another configuration.

    Args:
        saved: `TrainConfig.to_dict` of the checkpoint.
        current: the same of the run that wants to resume.

    Raises:
        CheckpointError: names every field that differs, with both values.
    """
    # Through JSON, which knows no tuples.
    old, new = (flat(json.loads(json.dumps(values))) for values in (saved, current))
    differing = [
        f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if name not in _FREE_FIELDS and old.get(name) != new.get(name)
    ]
    if differing:
        raise CheckpointError(f"cannot resume with another configuration: {'; '.join(differing)}")


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy, on the CPU, of what training changes: all of the state dict but the frozen parameters."""
    return {name: tensor.cpu().clone() for name, tensor in _trained(model).items()}


@torch.no_grad()
def restore_trained_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copies a `trained_state` back into the model, in place.

    Raises:
        ValueError: the state is another model's; nothing is changed then.
    """
    own = _trained(model)  # its tensors share the model's memory
    shapes = {name: list(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)}
    wrong = sorted(
        name for name in own.keys() | state.keys() if name not in own or shapes.get(name) != [*own[name].shape]
    )
    if wrong:
        expected = list(own[wrong[0]].shape) if wrong[0] in own else "nothing"
        raise ValueError(
            f"the saved state does not fit this {type(model).__name__}: expected {expected} for {wrong[0]}, got "
            f"{shapes.get(wrong[0], 'nothing')} ({len(wrong)} such tensors)"
        )
    for name, value in state.items():
        own[name].copy_(value)


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def random_state() -> dict[str, Any]:
    """The state of every random number generator of this process: Python, NumPy, torch on CPU and CUDA."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": (version, internal, gauss),
        "numpy": (kind, torch.from_numpy(np.array(keys, dtype=np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """The inverse of `random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
