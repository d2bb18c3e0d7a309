"""Provide the devices on which graphs are tested: a GPU, and the CPU with emulated graphs."""

from __future__ import annotations

import pytest
import torch

from efft.graphs import capture
from tests.efft.graphs.emulation import EmulatedGraphs


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Return a device on which graphs can be captured. On the CPU, ``EmulatedGraphs`` replaces CUDA graphs."""
    if request.param == "cpu":
        monkeypatch.setattr(EmulatedGraphs, "captured", 0)
        monkeypatch.setattr(EmulatedGraphs, "replayed", 0)
        monkeypatch.setattr(capture, "graphs_on", lambda device: EmulatedGraphs())
        monkeypatch.setattr(capture, "can_capture", lambda device: device.type in ("cpu", "cuda"))
    return torch.device(request.param)
