"""Load adapters from the Hugging Face hub and upload them. A repository holds the files of :mod:`efft.saving.io`."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from efft.saving.files import CARD, CONFIG, WEIGHTS
from efft.saving.io import load_adapter, save_adapter
from efft_kernels import __version__


def from_pretrained(
    model: nn.Module, name: str | os.PathLike[str], revision: str | None = None, strict: bool = True
) -> nn.Module:
    """Load an adapter from a folder, or from the hub if ``name`` is a name such as ``"owner/adapter"``.

    The adapter is loaded with :func:`efft.load_adapter`. The network is used only if ``name`` has the form of two words
    with a slash between them, is not a ``Path``, and is not an existing folder. Only the three files of the adapter are
    downloaded.

    Args:
        model: the base model on which the adapter was trained.
        name: path of a folder, or name of a repository on the hub.
        revision: branch, tag or commit of the repository. With a commit, every call loads the same adapter.
        strict: as in :func:`efft.load_adapter`.

    Returns:
        The same ``model``.

    Raises:
        FileNotFoundError: the folder or repository holds no adapter.
        OSError: the repository does not exist or cannot be reached.
        ImportError: the adapter is on the hub, and huggingface_hub is not installed.
        ValueError: as in :func:`efft.load_adapter`.
    """
    if not isinstance(name, str) or Path(name).exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return load_adapter(model, name, strict)
    try:
        folder = _hub().snapshot_download(
            name,
            revision=revision,
            allow_patterns=[WEIGHTS, CONFIG, CARD],
            library_name="efft-kernels",
            library_version=__version__,
        )
    except OSError as error:
        raise OSError(
            f"{name!r} is not a folder here, and fetching it from the Hugging Face hub failed ({type(error).__name__}: "
            f"{error}); check the name, the connection and, for a private repository, `hf auth login`"
        ) from error
    return load_adapter(model, folder, strict)


def push_to_hub(model: nn.Module, name: str, info: dict[str, Any] | None = None, private: bool = False) -> str:
    """Write the adapter to the repository ``name`` on the hub, which is created if needed.

    Args:
        model: a model that :func:`efft.apply` has adapted; it may be merged.
        name: ``"owner/adapter"``, or ``"adapter"`` for a repository of your own account.
        info: as in :func:`efft.save_adapter`.
        private: whether a new repository is private.

    Returns:
        The URL of the commit.

    Raises:
        ValueError: the model is not adapted. Nothing is uploaded in that case.
        ImportError: huggingface_hub is not installed.
    """
    hub = _hub()
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder, info)
        repository = hub.create_repo(name, private=private, exist_ok=True).repo_id
        commit = hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload EFFT adapter")
    return str(commit.commit_url)


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("the hub needs huggingface_hub: pip install 'efft-kernels[hf]'") from error
    return huggingface_hub
