"""The table of measurements by which ``auto`` chooses on a GPU: fused kernels, or the vendor's products.

Each row of ``measured.json`` beside this file names the GPU and the versions that it was measured on. A row speaks for
a compute capability, never for a GPU's name, and only for the backends that it lists. Where no row fits, ``auto`` takes
the vendor's products. :mod:`efft_kernels.autotune` writes tables and, where ``EFFT_AUTOTUNE`` is set, measures what no
row speaks for.

Every backend gives the same bits from run to run, because no kernel adds atomically. A choice therefore changes the
speed and the last rounding, nothing else.
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
#: A row speaks for sizes up to this factor away, within which tiles and waves change little.
NEAR = 2.0
#: The largest table that is read, in bytes: room for tens of thousands of rows.
_LARGEST = 16 * 2**20


@dataclass(frozen=True)
class Case:
    """What was measured: an op, its sizes, its dtype ("bfloat16") and the GPU's :func:`generation`."""

    op: str
    tokens: int
    d_in: int
    d_out: int
    r1: int
    dtype: str
    capability: int


@dataclass(frozen=True)
class Row:
    """Microseconds of forward and backward by each backend, fastest first, and where they were measured."""

    case: Case
    microseconds: dict[str, float]
    origin: str

    def __post_init__(self) -> None:
        # Sorted here and not in fastest(): torch.compile may take the floats for graph inputs, which it cannot compare.
        object.__setattr__(self, "microseconds", dict(sorted(self.microseconds.items(), key=lambda item: item[1])))


class Measurer(Protocol):
    """What :func:`fastest` asks for a case that no row is about (:mod:`efft_kernels.autotune` has the only one)."""

    def can_measure(self, device: torch.device) -> bool:
        """Whether it may measure on ``device`` at this moment."""

    def measure(self, case: Case, device: torch.device, backends: Sequence[str]) -> Row:
        """The new row for ``case``, which it also keeps for later processes."""


def generation(device: torch.device | str) -> int:
    """The major compute capability of a GPU; negative for GPUs of AMD, which number theirs in another way."""
    major = torch.cuda.get_device_capability(device)[0]
    return -major if torch.version.hip else major


def read(path: Path) -> tuple[Row, ...]:
    """Return the rows of a table. Raises ValueError, which names the file, if it does not hold a table."""
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST} bytes")
        return tuple(map(_row, json.loads(path.read_text())))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a table of measurements ({error!r}): delete it, or name another file"
        ) from None


def _row(values: dict[str, Any]) -> Row:
    """A row from its JSON. Raises ValueError, TypeError or KeyError if a part is missing or has the wrong type."""
    row = Row(Case(**values["case"]), dict(values["microseconds"]), values["origin"])
    names, numbers = asdict(row.case), ("tokens", "d_in", "d_out", "r1", "capability")
    sizes = {name: names.pop(name) for name in numbers}
    wrong = [name for name, value in names.items() if not isinstance(value, str)]
    wrong += [name for name, value in sizes.items() if type(value) is not int or abs(value) >= 2**40]
    wrong += [name for name, us in row.microseconds.items() if not 0 <= us < math.inf]
    if wrong or not isinstance(row.origin, str):
        raise ValueError(f"{wrong[0] if wrong else 'origin'} has a value of the wrong type or size")
    return row


def write(path: Path, rows: Sequence[Row]) -> None:
    """Replace the table at once, so that another process reads either the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    beside.replace(path)


#: Read at import and kept in a global, on which torch.compile can guard; it cannot read files.
_rows: list[Row] = [*read(COMMITTED)]
_measurer: Measurer | None = None


def plug_in(measurer: Measurer, rows: Sequence[Row]) -> None:
    """Let :func:`fastest` ask ``measurer`` where no row speaks for a case, and look at ``rows`` first."""
    global _measurer
    _rows[:0] = rows
    _measurer = measurer


def fastest(case: Case, device: torch.device, backends: Sequence[str]) -> str | None:
    """Which of ``backends`` measured fastest for this case or one like it; None where nothing was measured."""
    row = nearest(case, _rows, 1.0)
    if row is None and _measurer is not None and _measurer.can_measure(device):
        row = _measurer.measure(case, device, backends)
        _rows.append(row)
    row = row or nearest(case, _rows, NEAR)
    if row is None and case.op != "tt_linear":  # most of what the op does is the same product
        row = nearest(replace(case, op="tt_linear"), _rows, NEAR)
    return next((b for b in row.microseconds if b in backends), None) if row is not None else None


def is_final(device: torch.device) -> bool:
    """Whether :func:`fastest` would give the same answer again: not where it may measure later what it may not now."""
    return _measurer is None or _measurer.can_measure(device)


def nearest(case: Case, rows: Sequence[Row], widths: float) -> Row | None:
    """The row that is most like ``case`` in tokens, d_in and d_out (the first of equals); None if none is near.

    A row is near if its tokens are at most a factor of :data:`NEAR` away and its d_in and d_out at most a factor of
    ``widths``. It must also agree with ``case`` in whether rows are whole multiples of 16 bytes, which the fastest
    kernels need, in the rank once padded to a power of two (at least 32), and in the dtype, where float16 and bfloat16
    count as one.
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
