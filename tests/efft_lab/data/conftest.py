"""Provide fixtures for the data tests, which use neither a network nor the user's cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image", reason="reading images needs the vision extra")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty cache folder, and disable pip's package index, so a test cannot download packages by accident."""
    monkeypatch.setenv("EFFT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path / "home"


@pytest.fixture
def write_image() -> Callable[[Path, int], Path]:
    """Return a function that writes a small PNG whose pixels depend only on a number."""

    def write(path: Path, number: int) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.RandomState(number).randint(0, 256, (6, 5, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(path, format="PNG")
        return path

    return write
