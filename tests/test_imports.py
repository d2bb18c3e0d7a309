"""Test that importing the packages needs no optional package, GPU or compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPTIONAL = (
    *("triton", "timm", "torchvision", "PIL", "accelerate", "tqdm", "tyro", "matplotlib", "onnx", "transformers"),
    *("peft", "huggingface_hub", "scipy"),
)

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""


def fresh(program: str) -> subprocess.CompletedProcess[str]:
    """Run ``program`` in a new interpreter that cannot import the optional packages."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    command = [sys.executable, "-c", BLOCK.format(blocked=set(OPTIONAL)) + program]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_the_block_works() -> None:
    program = "".join(f"try: import {name}\nexcept ModuleNotFoundError as e: print(e.name)\n" for name in OPTIONAL)
    assert fresh(program).stdout.split() == list(OPTIONAL)


@pytest.mark.parametrize(
    ("packages", "unwanted"),
    [
        ("efft_kernels", {*OPTIONAL, "efft"}),
        ("efft_kernels.env, efft_kernels.testing", {*OPTIONAL, "efft"}),
        ("efft", {*OPTIONAL}),
        ("efft_lab.cli, efft_lab.train, efft_lab.data, efft_lab.baselines", {*OPTIONAL}),
        ("efft_lab.compare.runner, efft_lab.compare.worker, efft_lab.compare.report", {*OPTIONAL}),
    ],
)
def test_imports_with_torch_alone(packages: str, unwanted: set[str]) -> None:
    program = (
        f"import {packages}, torch\n"
        "assert not torch.cuda.is_initialized(), 'CUDA was initialized'\n"
        f"print(sorted({unwanted} & {{name.partition('.')[0] for name in sys.modules}}))"
    )
    done = fresh(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


def test_every_module_of_the_library_imports_without_the_optional_packages() -> None:
    """The test skips the triton backend and ``__main__`` modules.

    Of the other modules, only efft.integrations.peft cannot be imported. It derives from a class of peft, and reports
    what to install.
    """
    program = (
        "import importlib, pkgutil, efft, efft_kernels\n"
        "for package in (efft, efft_kernels):\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        if module.name.startswith('efft_kernels.triton') or module.name.endswith('.__main__'):\n"
        "            continue\n"
        "        try:\n"
        "            importlib.import_module(module.name)\n"
        "        except Exception as error:\n"
        "            print(module.name, type(error).__name__, error)\n"
    )
    done = fresh(program)
    assert done.returncode == 0, done.stderr
    needs_peft = (
        "efft.integrations.peft ImportError efft.integrations.peft needs peft >= 0.21: pip install 'efft-kernels[hf]'"
    )
    assert done.stdout.splitlines() == [needs_peft]


def test_a_layer_trains_with_torch_alone() -> None:
    program = (
        "import torch, efft_kernels\n"
        "layer = efft_kernels.EfftLinear.from_linear(torch.nn.Linear(4, 6), rank=2, dropout=0.1)\n"
        "layer(torch.ones(3, 4)).sum().backward()\n"
        "print(layer.factors.V.grad.norm() > 0)"
    )
    done = fresh(program)
    assert done.stdout == "tensor(True)\n", done.stderr
