"""Append the results of a demo run to ``benchmarks/results/demo.jsonl``.

    make demo && python -m benchmarks.demo demo_out

The run must be complete, and must come from this checkout and this machine, because the recorded commit, versions and
machine are those of the present process.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from efft_lab.demo.settings import TASKS
from efft_lab.record import append, machine_facts

METHODS = {"linear": "linear probe", "efft": "EFFT"}
KEPT = ("trainable_parameters", "head_parameters", "saved_bytes", "test_accuracy", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to which the demo wrote its results")
    out: Path = parser.parse_args().out
    facts = {**machine_facts(), "command": "make demo"}
    rows = []
    for task in TASKS:
        for folder, method in METHODS.items():
            result = json.loads((out / f"{task}-{folder}" / "result.json").read_text(encoding="utf-8"))
            rows.append({**facts, "task": task, "method": method, **{name: result[name] for name in KEPT}})
    append("demo", rows)


if __name__ == "__main__":
    main()
