"""The README's tables, written from result files and from the library itself; a test fails when they differ.

python -m benchmarks.readme          # rewrite the tables in README.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS

README = RESULTS.parent.parent / "README.md"


def parameters() -> str:
    """Trainable parameters by architecture, counted on models without storage."""
    import timm
    import torch

    import efft
    from efft.params import count_plan
    from efft.plan import make_plan

    rows = []
    for name in (
        "vit_base_patch16_224",
        "vit_large_patch16_224",
        "vit_huge_patch14_224",
        "swin_tiny_patch4_window7_224",
        "swin_small_patch4_window7_224",
        "swin_base_patch4_window7_224",
        "swin_large_patch4_window7_224",
    ):
        with torch.device("meta"):
            model = timm.create_model(name)
        cells = [f"`{name}`"]
        for variant, sharing in (("efft1", "per_layer"), ("efft2", "per_layer"), ("efft2", "shared")):
            if variant == "efft1" and name.startswith("swin"):
                cells.append("-")
                continue
            config = efft.paper_config(name, variant, core_sharing=sharing)
            count = count_plan(model, make_plan(model, config))
            cells.append(f"{count.factors:,} ({count.factors / count.backbone:.3%})")
        rows.append(cells)
    return table(["model, the paper's ranks", "EFFT1", "EFFT2", "EFFT2, shared cores"], rows)


def train_step() -> str:
    """The latest run of each dtype in results/train_step.jsonl."""
    latest: dict[str, dict[str, Any]] = {}
    for row in read("train_step"):
        run = latest.get(row["dtype"])
        if run is None or run["date"] != row["date"]:
            run = latest[row["dtype"]] = {"date": row["date"], "facts": row, "ratios": {}}
        run["ratios"][row["row"]] = row["ratio"]
    names = {
        "floor": "frozen floor",
        "efft": "**EFFT2, this library (eager)**",
        "lora": "LoRA of `peft`",
        "naive": "EFFT2 as `W + dW`",
        "paper": "EFFT2 as the paper's code does it",
    }
    header = ["step of", *(f"{dtype}" for dtype in latest)]
    rows = [[title, *(f"{run['ratios'][key]:.2f}" for run in latest.values())] for key, title in names.items()]
    notes = [f"- {dtype}: {provenance(run['facts'])}" for dtype, run in latest.items()]
    return table(header, rows) + "\n\n" + "\n".join(notes)


def demo() -> str:
    """The latest run in results/demo.jsonl."""
    rows = read("demo")
    last = [row for row in rows if row["date"] == rows[-1]["date"]]
    cells = [
        [
            row["task"],
            row["method"],
            f"{row['trainable_parameters']:,}",
            f"{row['test_accuracy']:.1%}",
            f"{row['seconds']:.0f} s",
        ]
        for row in last
    ]
    header = ["task", "method", "trained parameters, head included", "test accuracy", "training time"]
    return table(header, cells) + f"\n\n- {provenance(last[0])}"


TABLES: dict[str, Callable[[], str]] = {"parameters": parameters, "train_step": train_step, "demo": demo}


def read(name: str) -> list[dict[str, Any]]:
    """The rows of a result file."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def provenance(row: dict[str, Any]) -> str:
    """Where a figure comes from, in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    return f"`{row['command']}`, commit {row['commit']}, {row['machine']}; {versions}; {row['date'][:10]}"


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def render(text: str) -> str:
    """``text`` with every ``<!-- table: name -->`` ... ``<!-- end -->`` block filled in."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table: (\w+) -->).*?(<!-- end -->)", fill, text, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(render(README.read_text()))
