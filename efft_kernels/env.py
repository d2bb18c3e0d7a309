"""Create the report of ``python -m efft_kernels`` on versions, devices and backends, with a self-test of each backend.

If a backend cannot run, the report states the reason.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch
from torch import Tensor

from efft_kernels.backends import AUTO_ORDER, Backend, can_run, current_backend
from efft_kernels.build import find
from efft_kernels.native import MISSING, instruction_set
from efft_kernels.ops import tt_linear

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
    """Return a description of this environment for bug reports, including a self-test of every backend and device."""
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
        if target == "cpu" and missing is None:
            lines[-1] += f", instruction set: {instruction_set()}"
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            continue
        for backend in Backend:
            if backend is Backend.AUTO:
                continue
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


#: Largest relative errors that the self-test allows.
_BUDGET = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def _self_test(backend: Backend, device: str) -> str:
    """Report the largest error of the update and its gradients against the dense formula in fp64, for each dtype."""
    errors = {}
    for dtype in _BUDGET:
        try:
            error = _error(backend, device, dtype)
        except Exception as failure:  # the report continues after any failure
            return f"self-test FAILED: {type(failure).__name__}: {str(failure).strip().splitlines()[0]}"
        if isinstance(error, str):
            return f"cannot run: {error}"
        errors[dtype] = error
    verdict = "passed" if all(error < _BUDGET[dtype] for dtype, error in errors.items()) else "FAILED"
    shown = ", ".join(f"{str(dtype).removeprefix('torch.')} {error:.0e}" for dtype, error in errors.items())
    return f"self-test {verdict} (relative error against fp64: {shown})"


def _error(backend: Backend, device: str, dtype: torch.dtype) -> float | str:
    """Return the largest error with x and W in ``dtype`` and fp32 factors, or the reason if the backend cannot run."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": (17, 24), "W": (40, 24), "D": (24, 5), "G": (5, 40)}
    dtypes = {"x": dtype, "W": dtype, "D": torch.float32, "G": torch.float32}
    given = {n: torch.randn(size, generator=generator).to(dtypes[n]) for n, size in sizes.items()}
    x, W, D, G = (given[n].to(device).requires_grad_(n != "W") for n in sizes)
    reason = can_run(backend, x, W, D, G)
    if reason is not None:
        return reason
    y = tt_linear(x, W, None, D, G, backend=backend)
    xw, Ww, Dw, Gw = (tensor.double() for tensor in given.values())
    effective = Ww.t() + Dw @ Gw
    yw = xw @ effective
    dense = xw.t() @ yw
    expected = [yw, yw @ effective.t(), dense @ Gw.t(), Dw.t() @ dense]
    got = [y, *torch.autograd.grad(y, (x, D, G), yw.to(y))]
    return float(torch.tensor([_relative(a, b) for a, b in zip(got, expected, strict=True)]).max())  # NaN stays NaN


def _relative(got: Tensor, expected: Tensor) -> float:
    return ((got.detach().cpu().double() - expected).norm() / expected.norm()).item()
