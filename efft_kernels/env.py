"""The environment report of ``python -m efft_kernels``: versions, devices, backends and why not, a self-test."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch
from torch import Tensor

from efft_kernels.backends import AUTO_ORDER, Backend, can_run, current_backend
from efft_kernels.build import find
from efft_kernels.native import MISSING
from efft_kernels.ops import tt_linear
from efft_kernels.testing import backends

_PACKAGES = (
    "efft-kernels",
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "timm",
    "torchvision",
    "transformers",
    "peft",
)


def report() -> str:
    """A paste-ready description of this environment, ending with a numeric self-test of every backend on every
    device."""
    lines = [f"python        {platform.python_version()} on {platform.platform()}"]
    lines += [f"{name:<13} {_version(name)}" for name in _PACKAGES]
    lines.append(f"cpu           {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    lines.append(f"cuda          {_cuda()}")
    lines.append(
        f"EFFT_BACKEND  {os.environ.get('EFFT_BACKEND', 'not set')} (calls without backend= ask for "
        f"{current_backend().value!r}; 'auto' tries {', '.join(b.value for b in AUTO_ORDER)})"
    )
    for target, missing in MISSING.items():
        lines.append(f"{target + ' library':<13} {find(target) if missing is None else f'not loaded: {missing}'}")
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            continue
        for backend in backends():
            lines.append(f"{backend.value + ' on ' + device:<18} {_self_test(backend, device)}")
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    if not torch.cuda.is_available():
        return f"not available (torch built for CUDA {torch.version.cuda})"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}: {', '.join(names)}"


def _self_test(backend: Backend, device: str) -> str:
    """Error of the update and of each gradient against the dense formula in fp64."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": (17, 24), "W": (40, 24), "D": (24, 5), "G": (5, 40)}
    wide = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in sizes.items()}
    x, W, D, G = (wide[n].to(device, torch.float32).requires_grad_(n != "W") for n in sizes)
    reason = can_run(backend, x, W, D, G)
    if reason is not None:
        return f"cannot run: {reason}"
    y = tt_linear(x, W, None, D, G, backend=backend)
    got = [y, *torch.autograd.grad(y.square().sum() / 2, (x, D, G))]
    xw, Ww, Dw, Gw = wide.values()
    effective = Ww.t() + Dw @ Gw
    yw = xw @ effective
    dense = xw.t() @ yw
    expected = [yw, yw @ effective.t(), dense @ Gw.t(), Dw.t() @ dense]
    errors = [_relative(a, b) for a, b in zip(got, expected, strict=True)]
    error = max(errors)
    return (
        f"self-test {'passed' if all(e < 1e-5 for e in errors) else 'FAILED'} (relative error {error:.0e} against fp64)"
    )


def _relative(got: Tensor, expected: Tensor) -> float:
    return ((got.detach().cpu().double() - expected).norm() / expected.norm()).item()
