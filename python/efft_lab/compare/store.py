"""Store results on disk as one JSON line per finished run.

The process can be killed at any moment. An incomplete last line is then ignored, and the results in all other lines are
kept.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Read a result file. Return a mapping from the key of each run to its record.

    An incomplete last line, as after a crash, is ignored.

    Raises:
        ValueError: a line that is not the incomplete last line is damaged.
    """
    records = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
            records[record["key"]] = record
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is not a result of a run ({error!r}); remove that line") from error
    return records


class Store:
    """A result file to which one process appends.

    Args:
        path: path of the file, which is created if it does not exist.

    Attributes:
        records: maps the key of each run to its record.

    Raises:
        RuntimeError: another process writes to the file. This is not detected on Windows.
        ValueError: a line of the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            _lock(self._file, path)
            content = path.read_bytes()
            os.ftruncate(self._file, content.rfind(b"\n") + 1)  # remove an incomplete last line
            self.records = read(path)
        except BaseException:
            os.close(self._file)
            raise

    def append(self, record: dict[str, Any]) -> None:
        """Append a record and wait until it is on the disk, where it survives a power failure."""
        line = json.dumps(record).encode() + b"\n"
        n_bytes = os.write(self._file, line)
        if n_bytes != len(line):
            raise OSError(f"the disk is full: {n_bytes} of {len(line)} bytes of a result were written")
        os.fsync(self._file)
        self.records[record["key"]] = record

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)


def _lock(file: int, path: Path) -> None:
    """Lock a file, except on Windows. The operating system releases the lock when the process ends for any reason."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RuntimeError(f"another process is adding results to {path}; wait for it, or give another file") from error
