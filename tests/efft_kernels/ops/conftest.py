"""Provide fixtures that run a test of an op for every backend, device and dtype, and record torch's operations.

Combinations that a backend does not support are deselected.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from efft_kernels import backends as choosing
from efft_kernels import native
from efft_kernels.backends import Backend
from efft_kernels.testing import backends, chained_matmul

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IDS = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}


#: Path of the library that runs the CUDA kernels on the CPU, or None. ``make check-cuda`` builds this library and runs
#: these tests with it.
EMULATED = os.environ.get("EFFT_EMULATED_CUDA")
#: The only backend of a session in which GPU kernels run on the CPU: triton in its interpreter (``make check-triton``),
#: or cuda in the emulator (``make check-cuda``). In other sessions, None.
ONLY = Backend.TRITON if os.environ.get("TRITON_INTERPRET") == "1" else Backend.CUDA if EMULATED else None
if EMULATED:
    torch.ops.load_library(EMULATED)
    choosing._no_cuda = lambda device: None
BACKENDS = [b for b in backends() if ONLY in (None, b)]
#: The backends that compute products with their own kernels rather than torch's; they do not support fp64.
OWN = (Backend.CPU, Backend.TRITON, Backend.CUDA)


#: The dtypes that each compiled backend does not support.
WITHOUT = {Backend.CPU: {torch.float16, torch.float64}, Backend.CUDA: {torch.float64}}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests that a backend cannot run, and skip the tests of a backend whose library is missing.

    The backend cpu needs the CPU. The backends triton and cuda need a GPU, except in sessions that ``ONLY`` describes.
    """

    def params(item: pytest.Item) -> dict[str, Any]:
        return item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}

    def runs(
        item: pytest.Item, backend: Backend
    ) -> bool:  # compares identities, because a backend and a device can have the same name
        return any(value is backend for value in params(item).values())

    def cannot(item: pytest.Item) -> bool:
        given = params(item)
        dtypes = {value for value in given.values() if isinstance(value, torch.dtype)}
        named = {value for value in given.values() if isinstance(value, Backend)}
        if any(WITHOUT.get(backend, set()) & dtypes for backend in named):
            return True
        if given.get("device") == "cuda":
            return Backend.CPU in named
        return ONLY is None and bool({Backend.TRITON, Backend.CUDA} & named)

    config.hook.pytest_deselected(items=[item for item in items if cannot(item)])
    items[:] = [item for item in items if not cannot(item)]
    for item in items:
        for target, missing in native.MISSING.items():
            if ONLY is None and missing is not None and runs(item, Backend(target)):
                item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture(params=DEVICES[:1] if ONLY else DEVICES, scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=BACKENDS, ids=lambda b: b.value, scope="session")
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


@pytest.fixture(params=[b for b in BACKENDS if b is not Backend.REFERENCE], ids=lambda b: b.value)
def kernels(request: pytest.FixtureRequest) -> Backend:
    """Return each backend that runs as registered ops; the reference is plain torch and therefore excluded."""
    return request.param


@pytest.fixture(scope="session")
def exact(backend: Backend) -> torch.dtype:
    """Return the most precise dtype of a backend, for tests of formulas rather than of rounding."""
    return torch.float32 if backend in OWN else torch.float64


@pytest.fixture(scope="session")
def assert_exact(exact: torch.dtype) -> Callable[..., None]:
    """Return a function that compares results with a formula in fp64.

    It allows only the error from a different order of sums in the precision ``exact``. ``terms`` is the size of the
    summands, for results that may be small because their summands cancel.
    """

    def check(got: Tensor, formula: Tensor, name: str = "result", terms: float = 0.0) -> None:
        assert got.dtype == exact, name
        size = max(formula.abs().max().item(), terms) if formula.numel() else 0.0
        torch.testing.assert_close(
            got.double(), formula, rtol=0, atol=256 * torch.finfo(exact).eps * size, msg=lambda text: f"{name}: {text}"
        )

    return check


@pytest.fixture(params=[b for b in BACKENDS if b not in OWN], ids=lambda b: b.value)
def fp64(request: pytest.FixtureRequest) -> Backend:
    """Return each backend that supports fp64."""
    return request.param


@pytest.fixture(scope="session")
def own(backend: Backend) -> bool:
    """Return whether a backend computes products with its own kernels, which torch's dispatcher does not see."""
    return backend in OWN


@pytest.fixture(params=DTYPES, ids=IDS.get, scope="session")
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=DTYPES[1:], ids=IDS.get, scope="session")
def low(request: pytest.FixtureRequest) -> torch.dtype:
    """Return each dtype with less precision than fp64; other tests such as gradcheck cover fp64."""
    return request.param


@pytest.fixture(scope="session")
def product(device: str, low: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a matrix product. The tests compare the errors of the library's kernels with the errors of this product.

    In general this is the vendor's product. For fp32 on a GPU, the vendor's product adds in several chains and is
    therefore more accurate. There the function adds in one chain, like the library's kernels.
    """
    return chained_matmul if device == "cuda" and low == torch.float32 else torch.matmul


class Recorder(TorchDispatchMode):
    """Record torch's operations inside the ``with`` block, including those inside registered ops.

    Attributes:
        registered: names of the registered ops called.
        allocated: shape of every tensor in new memory.
        products: shape of every matrix product's result.
    """

    PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")

    def __init__(self) -> None:
        super().__init__()
        self.registered: list[str] = []
        self.allocated: list[tuple[int, ...]] = []
        self.products: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if func.namespace == "efft":
            self.registered.append(func.name())
            key = torch._C.DispatchKey.CUDA if tensors[0].is_cuda else torch._C.DispatchKey.CPU
            with self:  # calls the kernel directly and records the operations inside it
                return func.redispatch(torch._C.DispatchKeySet(key), *args, **(kwargs or {}))
        with self:  # matmul, linear, ... consist of other operators
            out = func.decompose(*args, **(kwargs or {}))
        if out is not NotImplemented:
            return out
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tensors}
        for result in torch.utils._pytree.tree_leaves(out):
            if not isinstance(result, Tensor):
                continue
            if result.untyped_storage().data_ptr() not in known:
                self.allocated.append(tuple(result.shape))
            if func._schema.name.removeprefix("aten::") in self.PRODUCTS:
                self.products.append(tuple(result.shape))
        return out


@pytest.fixture(scope="session")
def record() -> Callable[[], Recorder]:
    return Recorder
