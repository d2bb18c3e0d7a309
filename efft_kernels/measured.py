"""Read and write the table of measurements by which the backend ``auto`` chooses on a GPU.

The choice is between the fused kernels of this package and the matrix products of the GPU's vendor (cuBLAS, which the
backend ``eager`` calls).

Each row of ``measured.json`` in this folder contains the times of several backends for one case (an op with its sizes
and its dtype) and names the GPU and the versions of torch and triton. A row applies to every GPU of the same major
compute capability, and compares only the backends that it lists. If no row applies, ``auto`` uses the vendor's
products. :mod:`efft_kernels.autotune` writes tables and, if ``EFFT_AUTOTUNE`` is set, measures cases for whose widths
there is no row.

No kernel of this package uses atomic additions, so a backend returns exactly the same results in every run on one GPU.
Different backends may round differently.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

COMMITTED = Path(__file__).with_name("measured.json")
#: A row applies to sizes that differ by at most this factor, because the kernels are then launched in a similar way.
NEAR = 2.0
#: The largest table that is read, in bytes. This is enough for tens of thousands of rows.
_LARGEST = 16 * 2**20


@dataclass(frozen=True)
class Case:
    """Identify a measured case: the op, its sizes, its dtype ("bfloat16") and the GPU's :func:`generation`."""

    op: str
    tokens: int
    d_in: int
    d_out: int
    r1: int
    dtype: str
    capability: int


@dataclass(frozen=True)
class Row:
    """Hold the microseconds of forward plus backward for each backend, fastest first, and the origin of the times.

    ``kernels`` says which generation of this package's cuda kernels was measured (see ``EFFT_SM90_GENERATION`` in
    ENVIRONMENT.md). It is not the generation of the GPU.
    """

    case: Case
    microseconds: dict[str, float]
    origin: str
    kernels: int = 1

    def __post_init__(self) -> None:
        # Sorting in fastest() would fail under torch.compile. It may turn the floats into inputs of the graph, and
        # inputs of a graph cannot be compared.
        object.__setattr__(self, "microseconds", dict(sorted(self.microseconds.items(), key=lambda item: item[1])))


class Measurer(Protocol):
    """Measure cases for :func:`fastest` (implemented by :mod:`efft_kernels.autotune`)."""

    def can_measure(self, device: torch.device) -> bool:
        """Return whether a measurement on ``device`` is possible at this moment."""

    def measure(self, case: Case, device: torch.device, backends: Sequence[str]) -> Row:
        """Measure ``case``, store the new row for later processes, and return it."""


def generation(device: torch.device | str) -> int:
    """Return the major compute capability of a GPU; negative for AMD GPUs, which use a different numbering."""
    major = torch.cuda.get_device_capability(device)[0]
    return -major if torch.version.hip else major


def read(path: Path) -> tuple[Row, ...]:
    """Return the rows of a table. Raise ValueError with the file's name if the file does not contain a table."""
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST} bytes")
        return tuple(map(_row, json.loads(path.read_text())))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a table of measurements ({error!r}): delete it, or name another file"
        ) from None


def _row(values: dict[str, Any]) -> Row:
    """Convert JSON to a row. Raise ValueError, TypeError or KeyError if a part is missing or has the wrong type."""
    row = Row(Case(**values["case"]), dict(values["microseconds"]), values["origin"], values.get("kernels", 1))
    names, numbers = asdict(row.case), ("tokens", "d_in", "d_out", "r1", "capability")
    sizes = {name: names.pop(name) for name in numbers}
    wrong = [name for name, value in names.items() if not isinstance(value, str)]
    wrong += [name for name, value in sizes.items() if type(value) is not int or abs(value) >= 2**40]
    wrong += [name for name, us in row.microseconds.items() if not 0 <= us < math.inf]
    wrong += [] if type(row.kernels) is int and row.kernels > 0 else ["kernels"]
    if wrong or not isinstance(row.origin, str):
        raise ValueError(f"{wrong[0] if wrong else 'origin'} has a value of the wrong type or size")
    return row


def write(path: Path, rows: Sequence[Row]) -> None:
    """Replace the table atomically, so that another process reads either the old table or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    beside.replace(path)


def requested_kernels() -> int:
    """Return the generation of the cuda kernels that ``EFFT_SM90_GENERATION`` selects.

    Raise ValueError if the variable has another value than 1, 2 or 3.
    """
    requested = os.environ.get("EFFT_SM90_GENERATION") or "1"
    if requested not in ("1", "2", "3"):
        raise ValueError(
            f"environment variable EFFT_SM90_GENERATION: expected 1, 2 or 3, got {requested!r}; unset it, or set it to "
            "one of these"
        )
    return int(requested)


#: The generation of the cuda kernels that this process uses.
KERNELS = requested_kernels()
#: The rows are read at import, because compiled code cannot read files. torch.compile can guard on this global.
_rows: list[Row] = [*read(COMMITTED)]
_measurer: Measurer | None = None


def plug_in(measurer: Measurer, rows: Sequence[Row]) -> None:
    """Make :func:`fastest` also search ``rows``, and call ``measurer`` for cases for whose widths there is no row.

    If two rows of one generation of kernels are equally similar to a case, one of ``rows`` is preferred.
    """
    global _measurer
    _rows[:0] = rows
    _measurer = measurer


def fastest(case: Case, device: torch.device, backends: Sequence[str]) -> str | None:
    """Return the one of ``backends`` that measured fastest for ``case`` or a similar case.

    For an op without rows, the rows of ``tt_linear`` count. Return None if no row applies, or if the row that applies
    contains none of ``backends``.

    A plugged-in measurer measures the case, unless a row has its d_in and d_out and a similar number of tokens.
    """
    row = _newest(case, 1.0)
    if row is None and _measurer is not None and _measurer.can_measure(device):
        row = _measurer.measure(case, device, backends)
        _rows.append(row)
    row = row or _newest(case, NEAR)
    if row is None and case.op != "tt_linear":  # all ops spend most of their time on x Wᵀ, like tt_linear
        row = _newest(replace(case, op="tt_linear"), NEAR)
    return next((b for b in row.microseconds if b in backends), None) if row is not None else None


def _newest(case: Case, widths: float) -> Row | None:
    """Return the nearest row for the generation of cuda kernels that this process uses, or else for an older one."""
    for kernels in range(KERNELS, 0, -1):
        row = nearest(case, [row for row in _rows if row.kernels == kernels], widths)
        if row is not None:
            return row
    return None


def is_final(device: torch.device) -> bool:
    """Return whether :func:`fastest` would return the same result later.

    The result may change if a measurer is plugged in that cannot measure now but may measure later.
    """
    return _measurer is None or _measurer.can_measure(device)


def nearest(case: Case, rows: Sequence[Row], widths: float) -> Row | None:
    """Return the row that is most similar to ``case`` in tokens, d_in and d_out; None if no row is near.

    If several rows are equally similar, return the first of them. A row is near if its tokens differ by at most a
    factor of :data:`NEAR`, and its d_in and d_out by at most a factor of ``widths``. The row must also agree with
    ``case`` in

    - the op and the compute capability,
    - the dtype (float16 and bfloat16 count as equal),
    - the rank, rounded up to a power of two that is at least 32, and
    - whether d_in is a multiple of 8, and whether d_out is. In half precision, matrix rows are then multiples of 16
      bytes, which the fastest kernels need.
    """

    def kind(c: Case) -> tuple[Any, ...]:
        dtype = "bfloat16" if c.dtype == "float16" else c.dtype
        return c.op, c.d_in % 8 == 0, c.d_out % 8 == 0, max(c.r1 - 1, 31).bit_length(), dtype, c.capability

    expected = kind(case)
    best, least = None, math.inf
    for row in rows:
        tokens, d_in, d_out = (
            abs(math.log(max(one, 1) / max(other, 1)))
            for one, other in zip(_sizes(case), _sizes(row.case), strict=True)
        )
        near = tokens <= math.log(NEAR) and max(d_in, d_out) <= math.log(widths)
        if near and tokens + d_in + d_out < least and kind(row.case) == expected:
            best, least = row, tokens + d_in + d_out
    return best


def _sizes(case: Case) -> tuple[int, int, int]:
    return case.tokens, case.d_in, case.d_out
