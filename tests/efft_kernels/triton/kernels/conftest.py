"""Select the tests that this session can run, and set the default device.

A session with Triton's interpreter (``make check-triton``) collects all tests of this folder. A session with a GPU
collects all except ``OF_THE_INTERPRETER`` and compiles the kernels. Other sessions collect none.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OF_THE_INTERPRETER = ["test_checks.py", "test_layers.py"]
ON_A_GPU = torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
collect_ignore_glob = [] if INTERPRETED else OF_THE_INTERPRETER if ON_A_GPU else ["test_*.py"]


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    torch.set_default_device("cpu" if INTERPRETED else "cuda")
    yield
    torch.set_default_device(None)
