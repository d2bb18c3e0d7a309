"""What a run reports while it goes: one JSON object per line in metrics.jsonl, and a progress bar."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efft.config import is_number
from efft_lab.train.checkpoint import CheckpointError


class MetricsLog:
    """Appends records to a JSONL file as they happen, and hands their numbers to the trackers of a run.

    Args:
        path: the file; None writes nothing (every process but the first).
        accelerator: has the trackers, if there are any.
    """

    def __init__(self, path: Path | None, accelerator: Any = None) -> None:
        self._accelerator = accelerator
        self._file = None if path is None else open(path, "ab")  # noqa: SIM115  # closed at the end of the run

    def cut(self, size: int) -> None:
        """Forgets what was written after the first `size` bytes.

        Raises:
            CheckpointError: the file is shorter, so it was changed by hand.
        """
        if self._file is None:
            return
        if self._file.tell() < size:
            raise CheckpointError(
                f"{self._file.name} has {self._file.tell()} bytes, but had {size} when its checkpoint was written"
            )
        self._file.truncate(size)

    def write(self, **record: Any) -> None:
        """Appends one record; it can be read at once."""
        if self._file is not None:
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
        self.track(record["kind"], record, record["update"])

    def track(self, kind: str, values: Mapping[str, Any], step: int) -> None:
        """Hands the numbers among some values to the trackers."""
        numbers = {f"{kind}/{name}": value for name, value in values.items() if is_number(value) and name != "update"}
        if self._accelerator is not None and self._accelerator.trackers:
            self._accelerator.log(numbers, step=step)

    def sync(self) -> int:
        """Makes the records durable; returns the length of the file in bytes."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Closes the file and the trackers."""
        for tracker in getattr(self._accelerator, "trackers", ()):
            tracker.finish()
        if self._file is not None:
            self._file.close()


def read_metrics(path: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, optionally only those of one kind (``step`` or ``epoch``).

    A last line that is still being written is left out.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]
    records = [json.loads(line) for line in lines]
    return [record for record in records if kind in (None, record["kind"])]
