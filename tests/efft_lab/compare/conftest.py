"""Provide a suite that takes a few seconds: a tiny random ViT on scikit-learn's digits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

for package in ("accelerate", "timm", "tyro", "sklearn", "scipy"):
    pytest.importorskip(package, reason="needs the dev extra")

TRAIN = {
    **{"model": "test_vit", "pretrained": False, "image_size": 32, "max_test": 60},
    **{"epochs": 1, "batch_size": 100, "schedule_per": "update", "drop_path": 0.0, "warmup": 0.0},
}
METHODS: dict[str, Any] = {
    "EFFT2": {"method": "efft", "efft": {"rank": 4, "scale": 10.0}, "grid": {"lr": [1e-4, 1e-2]}},
    "probe": {"method": "linear", "lr": 1e-2},
    "pixels": {"method": "pixels"},
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use an empty cache folder, and disable pip's package index, so a test cannot download packages by accident."""
    monkeypatch.setenv("EFFT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")


@pytest.fixture
def tiny() -> dict[str, Any]:
    """Return the fields of the suite file. The suite has 2 search runs and 6 final runs."""
    return {
        "name": "tiny",
        "train": dict(TRAIN),
        "tasks": {"digits": {}},
        "methods": {name: dict(entry) for name, entry in METHODS.items()},
        "seeds": [3, 4],
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Return a function that writes a suite to a file."""

    def to_file(fields: dict[str, Any]) -> Path:
        path = tmp_path / "tiny.json"
        path.write_text(json.dumps(fields))
        return path

    return to_file
