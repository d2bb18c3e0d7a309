"""Find significant slowdowns and speedups between two result files or two revisions of the library.

    python -m benchmarks compare before/ops.jsonl after/ops.jsonl
    python -m benchmarks compare --revisions main HEAD -- --quick --rows efft:eager

The frozen baseline (the row "floor") is the layer or model without an update. The command compares the ratios to the
frozen baseline if the result lines have them. Otherwise, and for the frozen baseline itself, it compares seconds. Two
lines describe the same measurement if their fields in ``efft_lab.record.IDENTITY`` are equal. A missing field is equal
to None and to False. If a file contains a measurement several times, its last line counts. Measurements that are only
in one file are not compared. The command lists the measurements that are only in the first file.

A change is significant if the ranges from the 20 % to the 80 % quantile do not overlap and the medians differ by more
than the threshold. The exit code is 1 if a measurement became significantly slower. It is also 1 if a measurement was
lost: both files contain it, but only the first file has times for it.

With ``--revisions``, the command ``ops`` of this checkout measures the library of one revision after the other, with
the options that follow ``--``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efft_lab.record import IDENTITY, read

ROOT = Path(__file__).parents[1]
THRESHOLD = 0.05

Line = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """Describe a significant change of one measurement, or a measurement that was lost.

    Attributes:
        what: the values of the fields that identify the measurement, and the phase.
        factor: the median of the second file divided by the median of the first, or None if the second has no times.
        reason: why the second file has no times, otherwise empty.
    """

    what: str
    factor: float | None
    reason: str = ""

    @property
    def slower(self) -> bool:
        return self.factor is None or self.factor > 1

    def __str__(self) -> str:
        if self.factor is None:
            return f"lost    {self.what}: {self.reason}"
        return f"{'slower' if self.slower else 'faster'}  {self.what}: {self.factor - 1:+.1%}"


def compare(before: Iterable[Line], after: Iterable[Line], threshold: float = THRESHOLD) -> list[Change]:
    """Return the significant changes in the order of ``after``. Measurements that only one side contains are ignored.

    A measurement that has times only in ``before`` is a change with the factor None.
    """
    old = {_identity(line): line for line in before}
    changes = []
    for identity, new in {_identity(line): line for line in after}.items():
        was, now = _figures(old.get(identity, {})), _figures(new)
        name = _name(identity)
        if was and not now:
            changes.append(Change(name, None, new.get("reason") or "no times"))
        for phase in was.keys() & now.keys():
            factor = now[phase]["p50"] / was[phase]["p50"]
            apart = now[phase]["p20"] > was[phase]["p80"] or now[phase]["p80"] < was[phase]["p20"]
            if apart and abs(factor - 1) > threshold:
                changes.append(Change(f"{name} {phase}".rstrip(), factor))
    return changes


def report(changes: Sequence[Change], compared: int) -> str:
    """Return a text that counts the changes and lists them: first the lost measurements, then by decreasing factor."""
    slower = sum(change.slower for change in changes)
    head = f"{compared} lines compared: {slower} slower or lost, {len(changes) - slower} faster"
    ordered = sorted(changes, key=lambda change: -(change.factor or float("inf")))
    return "\n".join([head, *(str(change) for change in ordered)])


def common(before: Iterable[Line], after: Iterable[Line]) -> int:
    """Return the number of measurements that have times in ``before`` and a line in ``after``."""
    return len({_identity(line) for line in before if _figures(line)} & {_identity(line) for line in after})


def missing(before: Iterable[Line], after: Iterable[Line]) -> list[str]:
    """Return the names of the measurements that have times in ``before`` and no line in ``after``."""
    present = {_identity(line) for line in after}
    names = (_name(_identity(line)) for line in before if _figures(line) and _identity(line) not in present)
    return list(dict.fromkeys(names))


def measure_revision(revision: str, arguments: Sequence[str]) -> list[Line]:
    """Measure the library of ``revision`` with this checkout's command ``ops`` and return the result lines.

    The revision is checked out into a temporary worktree, into which the benchmarks of this checkout are copied.
    """
    with _worktree(revision) as tree:
        shutil.rmtree(tree / "benchmarks", ignore_errors=True)
        shutil.copytree(ROOT / "benchmarks", tree / "benchmarks", ignore=shutil.ignore_patterns("results"))
        results = tree / "compared"
        command = [sys.executable, "-m", "benchmarks", "ops", *arguments, "--results", str(results)]
        path = os.pathsep.join([str(tree), str(tree / "python")])
        subprocess.run(command, cwd=tree, env={**os.environ, "PYTHONPATH": path}, check=True)
        return read(results / "ops.jsonl")


@contextmanager
def _worktree(revision: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        added = subprocess.run([*git, "add", "--detach", str(tree), revision], capture_output=True, text=True)
        if added.returncode:
            raise ValueError(f"revision {revision!r}: {added.stderr.strip()}")
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], capture_output=True)


def _identity(line: Line) -> tuple[tuple[str, Any], ...]:
    return tuple((key, line[key]) for key in IDENTITY if line.get(key) not in (None, False))


def _name(identity: tuple[tuple[str, Any], ...]) -> str:
    return " ".join(str(value) for _, value in identity)


def _figures(line: Line) -> dict[str, dict[str, float]]:
    """Return the quantiles to compare, by phase, or an empty dict if the line has no times.

    These are the ratios, or the seconds if the line has no ratios or belongs to the frozen baseline. If the measurement
    has no phases, the only key is "".
    """
    found = line.get("seconds") if line.get("row") == "floor" else line.get("ratio", line.get("seconds"))
    if not found:
        return {}
    return {"": found} if "p50" in found else found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command ``compare``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", help="a result file, or a git revision")
    parser.add_argument("after", help="a second result file, or a second revision")
    parser.add_argument("--revisions", action="store_true", help="treat both names as git revisions and measure them")
    parser.add_argument(
        "--threshold",
        type=float,
        default=THRESHOLD,
        help="smallest relative change of a median that counts (default: %(default)s)",
    )
    parser.add_argument("ops", nargs="*", help="options of the command ops, after --; only with --revisions")
    args = parser.parse_args(arguments)
    if args.revisions:
        before, after = (measure_revision(revision, args.ops) for revision in (args.before, args.after))
    else:
        for path in (args.before, args.after):
            if not Path(path).is_file():
                raise ValueError(f"{path!r} is not a file; to compare git revisions add --revisions")
        before, after = read(Path(args.before)), read(Path(args.after))
        machines = {line["machine"] for line in (*before, *after)}
        if len(machines) > 1:
            print(f"these results come from different machines: {'; '.join(sorted(machines))}")
    changes = compare(before, after, args.threshold)
    print(report(changes, common(before, after)))
    for name in missing(before, after):
        print(f"only in the first file: {name}")
    return int(any(change.slower for change in changes))


if __name__ == "__main__":
    sys.exit(main())
