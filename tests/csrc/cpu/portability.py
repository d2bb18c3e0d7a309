"""Test one wheel with the extension under versions of Python and torch other than those that built it.

Usage: ``python tests/csrc/cpu/portability.py WHEEL PYTHON...``. This script is not part of the tests, because each
environment takes several GB. Each PYTHON is the path of an interpreter that can import torch, numpy and safetensors.
For each interpreter, the script installs the wheel into an empty folder, runs the environment report with its
self-test, and trains one adapted layer in fp32 and in bf16 with the backend ``cpu``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile

TRAINING = """
import platform, sys
import torch
from efft_kernels import EfftLinear, build, use_backend
assert build.find("cpu").is_relative_to(sys.argv[1])
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    layer = EfftLinear.from_linear(torch.nn.Linear(96, 80, dtype=dtype), rank=8)
    x, target = torch.randn(300, 96, dtype=dtype), torch.randn(300, 80, dtype=dtype)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    with use_backend("cpu"):
        for _ in range(20):
            loss = torch.nn.functional.mse_loss(layer(x).float(), target.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0], losses
    print(f"python {platform.python_version()}, torch {torch.__version__}, {dtype}: {losses[0]:.3f}, {losses[-1]:.3f}")
"""


def main(wheel: str, pythons: list[str]) -> None:
    for python in pythons:
        with tempfile.TemporaryDirectory() as folder:
            install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel]
            subprocess.run(install, check=True)
            for program in (["-m", "efft_kernels"], ["-c", TRAINING, folder]):
                environment = {"PYTHONPATH": folder, "PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": folder}
                subprocess.run([python, *program], cwd=folder, env=environment, check=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
