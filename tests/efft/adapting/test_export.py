"""Test exports of adapted, fused and merged models by torch.export and ONNX, which must match the model.

With the reference backend, an exported program does not need this library. With the default backend, it contains the
ops of this library.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efft
from efft_kernels import use_backend

pytestmark = pytest.mark.slow  # exports complete models

Make = Callable[..., nn.Module]
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}

#: A program that runs an exported model with torch only.
RUN = """
import sys, torch
program, inputs, out = sys.argv[1:]
torch.save(torch.export.load(program).module()(torch.load(inputs)), out)
assert not {"efft", "efft_kernels"} & set(sys.modules)
"""


def as_it_is(model: nn.Module) -> None:
    """Leave the update separate from the weights."""


Export = tuple[nn.Module, Tensor]
FORMS: dict[str, Callable[[nn.Module], Any]] = {"adapted": as_it_is, "fused": efft.fuse, "merged": efft.merge}


@pytest.fixture
def architecture(request: pytest.FixtureRequest, tiny_vit: Make, tiny_swin: Make, randomize: Make) -> Export:
    """Return an adapted model in eval mode, in one of the FORMS, and its input. The update is not small."""
    name, _, form = request.param.partition(" ")
    if name == "vit":
        model, x, config = tiny_vit(), torch.randn(2, 3, 16, 16), efft.EfftConfig(rank=4)
    else:
        model = tiny_swin(patch_size=4, depths=(2, 2), num_heads=(1, 2))
        x, config = torch.randn(2, 3, 32, 32), efft.EfftConfig(rank={"mhsa": 2, "ffn": (2, 4)})
    randomize(efft.apply(model, config), std=0.2).eval()
    FORMS[form](model)
    return model, x


every_form = pytest.mark.parametrize(
    "architecture", ["vit adapted", "vit fused", "vit merged", "swin adapted", "swin merged"], indirect=True
)


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = model(x)
    return result


@every_form
def test_a_program_of_torch_export_runs_without_this_library(architecture: Export, tmp_path: Path) -> None:
    model, x = architecture
    with use_backend("reference"):
        torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    torch.save(x, tmp_path / "x.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    files = [str(tmp_path / name) for name in ("model.pt2", "x.pt", "y.pt")]
    done = subprocess.run([sys.executable, "-c", RUN, *files], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), logits(model, x), **CLOSE)


@pytest.mark.parametrize("architecture", ["vit adapted", "swin adapted"], indirect=True)
def test_a_program_with_the_ops_of_this_library(architecture: Export) -> None:
    """The program accepts batches of 2 and 5 images, and has one ``tt_linear`` op for each adapted layer."""
    model, x = architecture
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for images in (x, torch.randn(5, *x.shape[1:])):
        torch.testing.assert_close(program.module()(images), logits(model, images), **CLOSE)
    ours = [str(node.target) for node in program.graph.nodes if str(node.target).startswith("efft.")]
    assert sum("tt_linear" in name for name in ours) == len(model.efft.layers)


@every_form
def test_onnxruntime_agrees(architecture: Export, tmp_path: Path) -> None:
    """The model is exported with 2 images, and must also work with 5 images."""
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript: pip install 'efft-kernels[dev]'")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'efft-kernels[dev]'")
    model, x = architecture
    path, batch = tmp_path / "model.onnx", torch.export.Dim("batch")
    with use_backend("reference"):
        torch.onnx.export(model, (x,), path, input_names=["images"], dynamic_shapes=({0: batch},), dynamo=True)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for images in (x, torch.randn(5, *x.shape[1:])):
        (y,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), logits(model, images), **CLOSE)
