"""The demo as a recorded measurement: runs it as a user would and keeps its results.

    python -m benchmarks.demo --out demo_out     # about ten minutes on two cores
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.record import append, machine_facts
from efft.demo.settings import TASKS

METHODS = {"linear": "linear probe", "efft": "EFFT2"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo_out"))
    out: Path = parser.parse_args().out
    subprocess.run([sys.executable, "-m", "efft.demo", "--out", str(out)], check=True)
    facts = machine_facts()
    rows = []
    for task in TASKS:
        for folder, method in METHODS.items():
            result = json.loads((out / f"{task}-{folder}" / "result.json").read_text(encoding="utf-8"))
            names = ("trainable_parameters", "factor_parameters", "saved_bytes", "test_accuracy", "seconds")
            rows.append({**facts, "task": task, "method": method, **{name: result[name] for name in names}})
    append("demo", rows)


if __name__ == "__main__":
    main()
