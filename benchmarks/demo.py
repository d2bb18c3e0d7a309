"""Append the results of a run of ``make demo`` to ``benchmarks/results/demo.jsonl``.

    make demo && python -m benchmarks.demo demo_out

``demo_out`` is the folder to which the demo wrote its results. The demo must be complete. Run this module in the same
checkout and on the same machine as the demo, because it records its own commit, versions and machine.
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
