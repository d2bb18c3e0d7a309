"""Which implementation of an op runs: the backends, how one is chosen, why one cannot run, how an op declares them.

A backend is chosen, in this order, by the ``backend=`` argument of a call, an enclosing :func:`use_backend`, the
environment variable ``EFFT_BACKEND`` (read once, at import) and otherwise ``auto``. ``auto`` takes ``triton`` or
``cuda`` where a measurement says that it is the fastest (:mod:`efft_kernels.measured`), else the first backend of
:data:`AUTO_ORDER` that can run the call; inside the transforms of ``torch.func`` only the reference can. A backend that
a caller names never falls back: it runs, or raises with the reason that :func:`can_run` gives.
"""

from __future__ import annotations

import enum
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from efft_kernels.measured import Case, fastest, generation, is_final
from efft_kernels.native import MISSING


class Backend(str, enum.Enum):
    """The implementations an op can have.

    ``AUTO`` chooses; ``REFERENCE`` is plain differentiable torch in fp32/fp64, the specification; ``EAGER`` is the
    hand-written backward on the vendor's matrix products, on any device; ``CPU`` is compiled (``csrc/cpu``); ``TRITON``
    and the compiled ``CUDA`` (``csrc/cuda``) fuse the update into the matrix product, on GPUs.
    """

    AUTO = "auto"
    REFERENCE = "reference"
    EAGER = "eager"
    CPU = "cpu"
    TRITON = "triton"
    CUDA = "cuda"

    @classmethod
    def parse(cls, value: str | Backend) -> Backend:
        """The member named ``value``; ValueError with the valid names otherwise."""
        try:
            return cls(value)
        except ValueError:
            names = ", ".join(repr(b.value) for b in cls)
            raise ValueError(f"unknown backend {value!r}: expected one of {names}") from None


#: What ``auto`` tries, in this order, where no measurement prefers kernels for GPUs (:mod:`efft_kernels.measured`).
AUTO_ORDER = (Backend.CPU, Backend.EAGER, Backend.REFERENCE)

#: Why no backend but the reference runs inside ``torch.func.grad``, ``vjp``, ``vmap``, ...
_TRANSFORMED = (
    "torch.func transforms torch's own operations, which this backend does not consist of; leave the choice to 'auto', "
    "which takes 'reference' there, or ask for 'reference'"
)

#: Whether Triton's kernels run in its interpreter, on the CPU; Triton too reads the variable once.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TRITON = False
with suppress(ImportError):  # raised by an import hook that hides the package
    _TRITON = importlib.util.find_spec("triton") is not None
#: The least major compute capability that the Triton and the CUDA kernels run on.
_CAPABILITY = 8

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DTYPES = {Backend.TRITON: _FLOATING[:3], Backend.CUDA: _FLOATING[:3], Backend.CPU: _FLOATING[1:3]}

try:
    _environment = Backend.parse(os.environ.get("EFFT_BACKEND") or "auto")
except ValueError as error:
    raise ValueError(f"environment variable EFFT_BACKEND: {error}") from None

# A plain global: torch.compile guards on it in every supported version, on a ContextVar or thread-local it does not.
_selected: Backend | None = None


def current_backend() -> Backend:
    """The backend that a call without ``backend=`` asks for: by ``use_backend``, else by ``EFFT_BACKEND``."""
    return _environment if _selected is None else _selected


@contextmanager
def use_backend(backend: str | Backend) -> Iterator[None]:
    """Ask for ``backend`` in every op that any thread calls while the ``with`` block runs."""
    global _selected
    before, _selected = _selected, Backend.parse(backend)
    try:
        yield
    finally:
        _selected = before


def can_run(backend: str | Backend, *tensors: Tensor | None) -> str | None:
    """None if ``backend`` can run an op on ``tensors``, else the reason why it cannot.

    ``reference`` and ``eager`` implement every op on every device; they need real floating-point tensors that all
    lie on one device. ``cpu`` needs the compiled extension, and float32 or bfloat16 tensors on the CPU; ``triton``
    needs the triton package and a GPU of compute capability 8.0 (or, for tests, ``TRITON_INTERPRET=1`` and the CPU);
    ``cuda`` needs the compiled extension and such a GPU. Neither runs float64.
    """
    backend = Backend.parse(backend)
    present = [t for t in tensors if t is not None]
    dtypes = _DTYPES.get(backend, _FLOATING)
    for t in present:
        if t.dtype not in dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            return f"{backend.value} runs {names} tensors, got {t.dtype}"
        if t.device != present[0].device:
            return f"all tensors must be on one device, got {present[0].device} and {t.device}"
    if not present:
        return None
    device = present[0].device
    if backend is Backend.CPU:
        return MISSING["cpu"] if device.type in ("cpu", "meta") else f"cpu runs tensors on the CPU, got {device}"
    if backend is Backend.CUDA:
        return _no_cuda(device)
    return _no_triton(device) if backend is Backend.TRITON else None


def _no_triton(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on ``device``; None if they can."""
    if not _TRITON:
        return "the triton package is not installed: pip install 'efft-kernels[triton]'"
    if device.type == "meta" or (device.type == "cpu" and _INTERPRETED):
        return None
    if device.type != "cuda":
        return f"triton runs on GPUs, got {device} (slowly on the CPU, for tests: set TRITON_INTERPRET=1)"
    if _INTERPRETED:
        return "TRITON_INTERPRET=1 runs triton on the CPU, got a GPU tensor: unset it"
    return None if torch.version.hip else _too_old("triton", device)


def _no_cuda(device: torch.device) -> str | None:
    """Why the compiled kernels for GPUs cannot run on ``device``; None if they can."""
    if MISSING["cuda"] is not None or device.type == "meta":
        return MISSING["cuda"]
    if device.type != "cuda" or torch.version.hip:
        return f"cuda runs on NVIDIA GPUs, got {'an AMD GPU' if device.type == 'cuda' else device}"
    return _too_old("cuda", device)


def _too_old(backend: str, device: torch.device) -> str | None:
    gpu = torch.cuda.get_device_properties(device)
    if gpu.major < _CAPABILITY:
        return f"{backend} needs a GPU of compute capability {_CAPABILITY}.0, got {gpu.major}.{gpu.minor}"
    return None


def resolve(
    op: str, backend: str | Backend | None, *tensors: Tensor | None, sizes: tuple[int, int, int, int] | None = None
) -> Backend:
    """The backend that runs ``op`` on ``tensors``; never ``AUTO``.

    With ``sizes`` (tokens, d_in, d_out, r1) ``auto`` looks for a measurement.

    Raises ValueError for an unknown name. Raises RuntimeError, with the reason, where the backend that was asked for
    (or, under ``auto``, every backend) cannot run.
    """
    requested = current_backend() if backend is None else Backend.parse(backend)
    if torch._C._are_functorch_transforms_active():
        if requested not in (Backend.AUTO, Backend.REFERENCE):
            raise RuntimeError(f"{op}: backend {requested.value!r} was asked for but cannot run: {_TRANSFORMED}")
        requested = Backend.REFERENCE
    if requested is not Backend.AUTO:
        reason = can_run(requested, *tensors)
        if reason is not None:
            raise RuntimeError(f"{op}: backend {requested.value!r} was asked for but cannot run: {reason}")
        return requested
    if sizes is not None and (measured := _fastest(op, sizes, *tensors)) is not None:
        return measured
    for candidate in AUTO_ORDER:
        if can_run(candidate, *tensors) is None:
            return candidate
    raise RuntimeError(f"{op}: no backend can run this call\n{explain(*tensors)}")


#: Earlier answers of :func:`_fastest`, because a search of the table takes longer than launching the kernels.
_answers: dict[tuple[Any, ...], Backend | None] = {}
#: How many answers are kept: enough for a model, and a limit where every batch has another length.
_MOST_ANSWERS = 4096


def _fastest(op: str, sizes: tuple[int, int, int, int], *tensors: Tensor | None) -> Backend | None:
    """The fastest by measurement of those that run on this GPU, the vendor's products included; None if unmeasured."""
    W = next(t for t in tensors if t is not None)
    if W.device.type != "cuda":
        return None
    if torch.compiler.is_compiling():
        return _look_up(op, sizes, W, *tensors)
    key = (op, sizes, *[None if t is None else (t.dtype, t.device) for t in tensors])
    if key not in _answers:
        answer = _look_up(op, sizes, W, *tensors)
        if not is_final(W.device):
            return answer
        if len(_answers) == _MOST_ANSWERS:
            _answers.clear()
        _answers[key] = answer
    return _answers[key]


def _look_up(op: str, sizes: tuple[int, int, int, int], W: Tensor, *tensors: Tensor | None) -> Backend | None:
    """The answer of :func:`_fastest` from the table."""
    able = [b for b in (Backend.EAGER, Backend.TRITON, Backend.CUDA) if can_run(b, *tensors) is None]
    if len(able) < 2:
        return None
    capability = generation(W.device)
    dtype = str(W.dtype).removeprefix("torch.")
    name = fastest(Case(op, *sizes, dtype, capability), W.device, [b.value for b in able])
    return None if name is None else Backend(name)


def explain(*tensors: Tensor | None) -> str:
    """What ``auto`` would take for ``tensors`` and why: one line per backend, the chosen one marked with ``*``.

    Backends that ``auto`` takes only where they measured faster come last.
    """
    lines, chosen = [], False
    for candidate in AUTO_ORDER:
        reason = can_run(candidate, *tensors)
        mark = " "
        if reason is None and not chosen:
            mark, chosen = "*", True
        lines.append(f"{mark} {candidate.value}: {reason or 'can run'}")
    for named in Backend:
        if named is not Backend.AUTO and named not in AUTO_ORDER:
            lines.append(
                f"  {named.value}: {can_run(named, *tensors) or 'can run, by name or where it measured faster'}"
            )
    return "\n".join(lines)


_library = torch.library.Library("efft", "DEF")
#: The backends that run behind a registered operator. ``reference`` is plain torch and needs none.
_REGISTERED = (Backend.EAGER, Backend.CPU, Backend.TRITON, Backend.CUDA)
#: The names of all operators that were declared.
OPERATORS: list[str] = []


def declare(
    operator: str,
    arguments: str,
    fake: Callable[..., object],
    *,
    eager: Callable[..., object],
    triton: Callable[[], ModuleType],
) -> dict[Backend, Callable[..., Any]]:
    """Declare the operator ``efft::<operator>`` and return its overloads, one per backend.

    All overloads have the same arguments, so that an op has one name in every layer, a profile shows which backend ran,
    and the compiled extension can register its overloads without declaring anything.

    Args:
        operator: the name, such as ``tt_linear_fwd``.
        arguments: the rest of the schema, ``(...) -> ...``.
        fake: returns outputs of the right shapes and dtypes, from arguments that may have no data.
        eager: the implementation of the backend ``eager``.
        triton: imports the module whose function ``operator`` is the implementation of ``triton``; it is called when
            the operator first runs, because Triton need not be installed.
    """

    def by_triton(*values: Any) -> Any:
        return getattr(triton(), operator)(*values)

    OPERATORS.append(operator)
    for backend in _REGISTERED:
        _library.define(f"{operator}.{backend.value}{arguments}")
        torch.library.register_fake(f"efft::{operator}.{backend.value}", fake, lib=_library)
    overloads = {backend: getattr(getattr(torch.ops.efft, operator), backend.value) for backend in _REGISTERED}
    for backend, overload in overloads.items():
        _mark_in_place(operator, backend, overload)
    _library.impl(f"{operator}.eager", eager, "CompositeExplicitAutograd")
    _library.impl(f"{operator}.triton", by_triton, "CompositeExplicitAutograd")
    return overloads


def _mark_in_place(operator: str, backend: Backend, overload: Any) -> None:
    """Raise the versions of the tensors that the operator changes in place, which torch does only for its own.

    By the versions autograd notices that a tensor is no longer what was saved for backward.
    """
    changed = [i for i, argument in enumerate(overload._schema.arguments) if argument.is_write]

    def kernel(keys: Any, *values: Any) -> Any:
        for i in changed:
            torch.autograd.graph.increment_version(values[i])
        return overload.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *values)

    if changed:
        _library.impl(f"{operator}.{backend.value}", kernel, "ADInplaceOrView", with_keyset=True)
