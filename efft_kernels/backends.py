"""Choose the backend (the implementation) that runs an op, explain why a backend cannot run, and declare operators.

A caller can request a backend in three ways. The first one that is set counts: the ``backend=`` argument of a call, an
enclosing :func:`use_backend`, or the environment variable ``EFFT_BACKEND`` (read once, at import). If none is set, the
backend is ``auto``. ``auto`` uses ``triton`` or ``cuda`` if a measurement shows that this backend is the fastest
(:mod:`efft_kernels.measured`), else the first backend of :data:`AUTO_ORDER` that can run the call. Inside the
transforms of ``torch.func`` only ``reference`` can run, so ``auto`` chooses ``reference`` there. A backend that a
caller requests by name never falls back to another one: it runs, or the call raises an error with the reason from
:func:`can_run`.
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
    """Name an implementation of an op.

    - ``AUTO`` chooses one of the others.
    - ``REFERENCE`` is plain differentiable torch code in fp32 or fp64, which defines the op.
    - ``EAGER`` has a hand-written backward pass and uses the vendor's matrix products, on any device.
    - ``CPU`` is compiled from ``csrc/cpu``.
    - ``TRITON``, and ``CUDA`` (compiled from ``csrc/cuda``), fuse the update into the matrix product on GPUs.
    """

    AUTO = "auto"
    REFERENCE = "reference"
    EAGER = "eager"
    CPU = "cpu"
    TRITON = "triton"
    CUDA = "cuda"

    @classmethod
    def parse(cls, value: str | Backend) -> Backend:
        """Return the member named ``value``; raise ValueError with the valid names if there is none."""
        try:
            return cls(value)
        except ValueError:
            names = ", ".join(repr(b.value) for b in cls)
            raise ValueError(f"unknown backend {value!r}: expected one of {names}") from None


#: The order in which ``auto`` tries backends unless a measurement (:mod:`efft_kernels.measured`) decides.
AUTO_ORDER = (Backend.CPU, Backend.EAGER, Backend.REFERENCE)

#: The reason why only the reference runs inside ``torch.func.grad``, ``vjp``, ``vmap`` and similar transforms.
_TRANSFORMED = (
    "torch.func transforms only torch's own operations, which this backend does not use; leave the choice to 'auto', "
    "which uses 'reference' there, or request 'reference'"
)

#: Whether Triton's kernels run in its interpreter on the CPU. Triton also reads this variable only once.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TRITON = False
with suppress(ImportError):  # raised by an import hook that hides the package
    _TRITON = importlib.util.find_spec("triton") is not None
#: The lowest major compute capability on which the Triton and CUDA kernels run.
_CAPABILITY = 8

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DTYPES = {Backend.TRITON: _FLOATING[:3], Backend.CUDA: _FLOATING[:3], Backend.CPU: _FLOATING[1:3]}

try:
    _environment = Backend.parse(os.environ.get("EFFT_BACKEND") or "auto")
except ValueError as error:
    raise ValueError(f"environment variable EFFT_BACKEND: {error}") from None

# This is a plain global because torch.compile guards on it in every supported version, unlike a ContextVar or a
# thread-local variable.
_selected: Backend | None = None


def current_backend() -> Backend:
    """Return the backend for calls without ``backend=``: from ``use_backend`` if active, else from ``EFFT_BACKEND``."""
    return _environment if _selected is None else _selected


@contextmanager
def use_backend(backend: str | Backend) -> Iterator[None]:
    """Request ``backend`` for every op that any thread calls while the ``with`` block runs."""
    global _selected
    before, _selected = _selected, Backend.parse(backend)
    try:
        yield
    finally:
        _selected = before


def can_run(backend: str | Backend, *tensors: Tensor | None) -> str | None:
    """Return None if ``backend`` can run an op on ``tensors``, else the reason why it cannot.

    All tensors must be on one device, and their dtypes must be float16, bfloat16, float32 or float64.

    - ``reference`` and ``eager`` implement every op on every device.
    - ``cpu`` needs the compiled extension, and float32 or bfloat16 tensors on the CPU.
    - ``triton`` needs the triton package and an NVIDIA GPU of compute capability 8.0 or newer, or an AMD GPU (for
      tests, ``TRITON_INTERPRET=1`` and the CPU). It does not support float64.
    - ``cuda`` needs the compiled extension and an NVIDIA GPU of compute capability 8.0 or newer. It does not support
      float64.
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
    """Return the reason why Triton's kernels cannot run on ``device``; None if they can."""
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
    """Return the reason why the compiled GPU kernels cannot run on ``device``; None if they can."""
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
    op: str,
    backend: str | Backend | None,
    *tensors: Tensor | None,
    sizes: tuple[int, int, int, int] | None = None,
    measured: str | None = None,
) -> Backend:
    """Return the backend that runs ``op`` on ``tensors``, which is never ``AUTO``.

    ``sizes`` is (tokens, d_in, d_out, r1) of a linear op. Without it, ``auto`` does not look for a measurement.
    ``measured`` is the op whose measurements count, if there are none for ``op`` itself.

    Raises:
        ValueError: the name of the backend is unknown.
        RuntimeError: the requested backend (or, under ``auto``, every backend) cannot run; the message has the reason.
    """
    requested = current_backend() if backend is None else Backend.parse(backend)
    if torch._C._are_functorch_transforms_active():
        if requested not in (Backend.AUTO, Backend.REFERENCE):
            raise RuntimeError(f"{op}: backend {requested.value!r} was requested but cannot run: {_TRANSFORMED}")
        requested = Backend.REFERENCE
    if requested is not Backend.AUTO:
        reason = can_run(requested, *tensors)
        if reason is not None:
            raise RuntimeError(f"{op}: backend {requested.value!r} was requested but cannot run: {reason}")
        return requested
    if sizes is not None and (best := _fastest(measured or op, sizes, *tensors)) is not None:
        return best
    for candidate in AUTO_ORDER:
        if can_run(candidate, *tensors) is None:
            return candidate
    raise RuntimeError(f"{op}: no backend can run this call\n{explain(*tensors)}")


#: Earlier results of :func:`_fastest`, because searching the table takes longer than launching the kernels.
_answers: dict[tuple[Any, ...], Backend | None] = {}
#: The number of results to keep: enough for a model, and bounded in case every batch has another length.
_MOST_ANSWERS = 4096


def _fastest(op: str, sizes: tuple[int, int, int, int], *tensors: Tensor | None) -> Backend | None:
    """Return the backend that measured fastest among those that can run this call on this GPU.

    Return None if the tensors are not on a GPU, if no measurement applies, or if only one backend can run.
    """
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
    """Compute the result of :func:`_fastest` from the table of measurements."""
    able = [b for b in (Backend.EAGER, Backend.TRITON, Backend.CUDA) if can_run(b, *tensors) is None]
    if len(able) < 2:
        return None
    capability = generation(W.device)
    dtype = str(W.dtype).removeprefix("torch.")
    name = fastest(Case(op, *sizes, dtype, capability), W.device, [b.value for b in able])
    return None if name is None else Backend(name)


def explain(*tensors: Tensor | None) -> str:
    """Return one line per backend that states whether the backend can run on ``tensors`` and, if not, the reason.

    ``*`` marks the backend that ``auto`` uses if no measurement applies. The last lines list ``triton`` and ``cuda``,
    which ``auto`` uses only if they measured faster.
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
                f"  {named.value}: {can_run(named, *tensors) or 'can run, if requested by name or measured faster'}"
            )
    return "\n".join(lines)


_library = torch.library.Library("efft", "DEF")
#: The backends that are called through a registered operator. ``reference`` is plain torch code and needs none.
_REGISTERED = (Backend.EAGER, Backend.CPU, Backend.TRITON, Backend.CUDA)
#: The names of all declared operators.
OPERATORS: list[str] = []


def declare(
    operator: str,
    arguments: str,
    fake: Callable[..., object],
    *,
    eager: Callable[..., object],
    triton: Callable[[], ModuleType],
    cuda: Callable[..., object] | None = None,
) -> dict[Backend, Callable[..., Any]]:
    """Declare the operator ``efft::<operator>`` and return its overloads, one per backend.

    All overloads have the same arguments. An op therefore has the same name everywhere, a profile shows which backend
    ran, and the compiled extension can register its overloads without declaring anything.

    Args:
        operator: the name, such as ``tt_linear_fwd``.
        arguments: the rest of the schema, ``(...) -> ...``.
        fake: returns outputs with the right shapes and dtypes, given arguments that may have no data.
        eager: the implementation for the backend ``eager``.
        triton: imports and returns the module whose function ``operator`` is the implementation for ``triton``. It is
            called when the operator first runs, because Triton may not be installed.
        cuda: the implementation for the backend ``cuda``, a function that composes the operator from other operators.
            None if the compiled extension registers the implementation.
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
    if cuda is not None:
        for device in ("CUDA", "CPU"):  # the emulator of the project's tests runs the CUDA kernels on the CPU
            _library.impl(f"{operator}.cuda", cuda, device)
    return overloads


def _mark_in_place(operator: str, backend: Backend, overload: Any) -> None:
    """Make each call of the operator increase the versions of the tensors that the operator changes in place.

    Autograd compares versions to detect that a tensor was changed after it was saved for the backward pass. torch
    increases them only for its own ops.
    """
    changed = [i for i, argument in enumerate(overload._schema.arguments) if argument.is_write]

    def kernel(keys: Any, *values: Any) -> Any:
        for i in changed:
            torch.autograd.graph.increment_version(values[i])
        return overload.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *values)

    if changed:
        _library.impl(f"{operator}.{backend.value}", kernel, "ADInplaceOrView", with_keyset=True)
