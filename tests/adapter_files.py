"""Edit the files of an adapter, with or without an update of the recorded hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Apply ``edit`` to the configuration in the folder."""
    description = json.loads((folder / CONFIG).read_text())
    edit(description)
    (folder / CONFIG).write_text(json.dumps(description))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Apply ``edit`` to the tensors, and update the recorded hash."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)
    record(folder)


def write_weights(folder: Path, content: bytes) -> None:
    """Replace the weight file with ``content``, and update the recorded hash."""
    (folder / WEIGHTS).write_bytes(content)
    record(folder)


def record(folder: Path) -> None:
    """Record the hash of the current weight file."""
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    edit_config(folder, lambda description: description.update(weights={"sha256": digest}))
