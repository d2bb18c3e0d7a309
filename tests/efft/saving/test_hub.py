"""Test loading adapters from the Hugging Face hub and uploading them. A local folder replaces the hub."""

from __future__ import annotations

import builtins
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efft

hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub: pip install 'efft-kernels[hf]'")

Make = Callable[..., nn.Module]
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


class Hub:
    """Replace the hub by one repository, ``me/adapter``, and record the requests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[tuple[str, Any]] = []

    def snapshot_download(self, name: str, **options: Any) -> str:
        self.calls.append((name, options))
        if name != "me/adapter":
            raise hub.errors.LocalEntryNotFoundError("no such repository")
        return str(self.folder)

    def create_repo(self, name: str, **options: Any) -> Any:
        self.calls.append((name, options))
        return types.SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> Any:
        self.calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
        shutil.copytree(folder_path, self.folder)
        return types.SimpleNamespace(commit_url="https://hub/me/adapter/commit/1")


@pytest.fixture
def mocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub(tmp_path / "repository")
    for name in ("snapshot_download", "create_repo", "upload_folder"):
        monkeypatch.setattr(hub, name, getattr(fake, name))
    return fake


def test_there_and_back(saved: tuple[nn.Module, Path], tiny_vit: Make, images: Tensor, mocked: Hub) -> None:
    model, _ = saved
    assert efft.push_to_hub(model, "adapter", info={"top-1": 0.9}, private=True) == "https://hub/me/adapter/commit/1"
    assert mocked.calls == [("adapter", {"private": True, "exist_ok": True}), ("me/adapter", FILES)]
    again = tiny_vit().eval()
    assert efft.from_pretrained(again, "me/adapter", revision="1") is again
    assert torch.equal(again(images), model(images))
    name, options = mocked.calls[-1]
    assert (name, options["revision"], sorted(options["allow_patterns"])) == ("me/adapter", "1", FILES)


def test_local_paths_never_touch_the_network(
    saved: tuple[nn.Module, Path], tiny_vit: Make, images: Tensor, mocked: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = saved
    monkeypatch.chdir(folder.parent)
    shutil.copytree(folder, "me/adapter")
    for path in (folder, str(folder), folder.name, "me/adapter"):
        assert torch.equal(efft.from_pretrained(tiny_vit().eval(), path)(images), model(images))
    for path in (Path("you/adapter"), "./you/adapter", "/you/adapter", "you/new/adapter", "adapter-1", "../adapter"):
        with pytest.raises(FileNotFoundError, match="no adapter in "):
            efft.from_pretrained(tiny_vit(), path)
    assert mocked.calls == []


def test_unknown_repository(tiny_vit: Make, mocked: Hub) -> None:
    message = (
        r"'me/adaptor' is not a folder here, and fetching it from the Hugging Face hub failed \(LocalEntryNotFound"
    )
    with pytest.raises(OSError, match=message):
        efft.from_pretrained(tiny_vit(), "me/adaptor")


def test_a_plain_model_is_not_pushed(tiny_vit: Make, mocked: Hub) -> None:
    with pytest.raises(ValueError, match=r"is not adapted: call efft\.apply"):
        efft.push_to_hub(tiny_vit(), "adapter")
    assert mocked.calls == []


def test_without_the_package(tiny_vit: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "huggingface_hub":
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"needs huggingface_hub: pip install 'efft-kernels\[hf\]'"):
        efft.from_pretrained(tiny_vit(), "me/adapter")
