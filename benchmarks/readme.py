"""Fill the tables of README.md, docs/experiments.md and docs/performance.md with data from result files.

    python -m benchmarks tables          # rewrites the tables in these pages
    python -m benchmarks tables ops_gpu  # prints one table

In a page, a table stands between the lines ``<!-- table: NAME -->`` and ``<!-- end -->``. The table ``parameters``
is computed with the library and has no result file. The table ``fp8_block`` contains predictions. The tests fail if a
page differs from the output of this module.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from benchmarks import fp8_block, study_tables, tables
from benchmarks.markdown import table
from efft_lab.record import RESULTS

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs/experiments.md", ROOT / "docs/performance.md")


def parameters() -> str:
    """Return a table of the number of factor parameters of each architecture, counted on the meta device.

    EFFT2 (the default) has one tensor train for attention and one for the MLPs. In a Swin, every stage has two such
    trains. EFFT1 has a single train for both. The table shows "-" for EFFT1 on a Swin, because the paper has no such
    configuration. In the last column, all blocks of a train share their cores. Percentages are relative to the number
    of parameters of the backbone.
    """
    import timm
    import torch

    import efft
    from efft.params import count_plan
    from efft.planning.plan import make_plan

    settings: tuple[tuple[Literal["efft1", "efft2"], str], ...] = (
        ("efft1", "per_layer"),
        ("efft2", "per_layer"),
        ("efft2", "shared"),
    )
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
        for variant, sharing in settings:
            if variant == "efft1" and name.startswith("swin"):
                cells.append("-")
                continue
            config = efft.paper_config(name, variant, core_sharing=sharing)
            count = count_plan(model, make_plan(model, config))
            cells.append(f"{count.factors:,} ({count.factors / count.backbone:.3%})")
        rows.append(cells)
    return table(["model (with the ranks of the paper)", "EFFT1", "EFFT2", "EFFT2, shared cores"], rows)


def summary() -> str:
    """Return a table that compares this library with LoRA of ``peft`` in six rows, from several result files."""
    memory = tables.newest("memory", level="model", model=tables.VIT_B, device="cpu")["float32"]
    cpu = tables.newest("model", model=tables.VIT_B, device="cpu", cuda_graphs=False)["float32"]
    graphs = tables.newest("model", model=tables.VIT_B, device="cuda", cuda_graphs=True)["bfloat16"]
    launched = tables.newest("model", model=tables.VIT_B, device="cuda", cuda_graphs=False)["bfloat16"]
    trained = [_of(cpu, row, "trainable") - _of(cpu, "floor", "trainable") for row in _RIVALS]
    saved = {row: _of(memory, row, "saved_bytes") / 2**20 for row in ("floor", "efft:cpu", "fused:cpu", "peft")}
    device = graphs[0]["gpu"]["name"].removeprefix("NVIDIA ")
    rows = [
        ["trained parameters, excluding the head", *(f"{n:,}" for n in trained)],
        ["adapter file, excluding the head", *(f"{_of(cpu, row, 'adapter_bytes') / 1e6:.1f} MB" for row in _RIVALS)],
        ["training step on a CPU, fp32", f"{_range(cpu, _SAME_ON_CPU)} x frozen", f"{_time(cpu, 'peft')} x frozen"],
        [
            f"training step on an {device}, bf16, with (without) a CUDA graph",
            *(f"{_time(graphs, row)} ({_time(launched, row)}) x frozen" for row in _RIVALS),
        ],
        [
            f"activations kept for the backward pass on a CPU, fp32, {memory[0]['batch']} images "
            f"(frozen model: {saved['floor']:.0f} MiB)",
            f"{saved['efft:cpu']:.0f} MiB; {saved['fused:cpu']:.0f} MiB if the adapted layers also compute the norms "
            "and GELUs before them (`efft.fuse`)",
            f"{saved['peft']:.0f} MiB",
        ],
        [
            "mean accuracy of a ViT-S/14 on twelve tasks (parameters)",
            *_accuracies("twelve", ("EFFT, auto", "LoRA (peft), all layers")),
        ],
    ]
    return table(["", "EFFT, this library", "LoRA of `peft`"], rows)


_RIVALS = ("efft:auto", "peft")
#: These rows run the same code on a CPU, so their difference is the noise of the machine.
_SAME_ON_CPU = ("efft:auto", "efft:cpu")


def _time(lines: Sequence[tables.Line], row: str) -> str:
    return f"{_of(lines, row, 'ratio')['p50']:.2f}"


def _range(lines: Sequence[tables.Line], rows: tuple[str, str]) -> str:
    return " to ".join(sorted({_time(lines, row) for row in rows}))


def _of(lines: Sequence[tables.Line], row: str, field: str) -> Any:
    return next(line[field] for line in lines if line["row"] == row)


def _accuracies(suite: str, methods: Sequence[str]) -> list[str]:
    """Return for each method a text with its mean accuracy over the tasks of a suite of ``efft compare``.

    The text also contains the number of trained parameters, excluding the head.
    """
    from efft_lab.compare import scores
    from efft_lab.compare.store import read

    final = [record for record in read(RESULTS / f"compare_{suite}.jsonl").values() if record["stage"] == "final"]
    found = scores.collect(final, dict.fromkeys(record["task"] for record in final))
    trained = {record["method"]: record["trainable_parameters"] - record["head_parameters"] for record in final}
    return [f"{fmean(found.means(method).values()):.1f} % ({trained[method]:,})" for method in methods]


def accuracy(suite: str, what: Literal["means", "comparisons"] = "means") -> str:
    """Return a table for a suite of ``efft compare``, from the results that exist.

    If ``what`` is "means", the table contains mean accuracies. If it is "comparisons", the table contains paired tests
    of the methods. Without results, the text :data:`benchmarks.tables.NOTHING` is returned.
    """
    from efft_lab.compare import report
    from efft_lab.compare import suite as suites
    from efft_lab.compare.agenda import Agenda
    from efft_lab.compare.store import read

    results = RESULTS / f"compare_{suite}.jsonl"
    found = getattr(report, what)(Agenda(suites.load(suite)), read(results)) if results.is_file() else ""
    return found or tables.NOTHING


TABLES: dict[str, Callable[[], str]] = {
    "summary": summary,
    "parameters": parameters,
    **tables.TABLES,
    **study_tables.TABLES,
    "fp8_block": fp8_block.predictions,
    "accuracy": partial(accuracy, "local"),
    "comparisons": partial(accuracy, "local", "comparisons"),
    "accuracy_efft2": partial(accuracy, "local_efft2"),
    "comparisons_efft2": partial(accuracy, "local_efft2", "comparisons"),
    "accuracy_long": partial(accuracy, "local_long"),
    "comparisons_long": partial(accuracy, "local_long", "comparisons"),
    "accuracy_grid": partial(accuracy, "local_grid"),
    "accuracy_twelve": partial(accuracy, "twelve"),
    "comparisons_twelve": partial(accuracy, "twelve", "comparisons"),
    "accuracy_hundred_epochs": partial(accuracy, "hundred_epochs"),
    "comparisons_hundred_epochs": partial(accuracy, "hundred_epochs", "comparisons"),
}


def render(text: str) -> str:
    """Return ``text`` with the current table in every block ``<!-- table: NAME --> ... <!-- end -->``."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table: (\w+) -->).*?(<!-- end -->)", fill, text, flags=re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the pages, or print the named tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"tables to print, instead of rewriting the pages: any of {', '.join(TABLES)}",
    )
    names = parser.parse_args(arguments).names
    unknown = [name for name in names if name not in TABLES]
    if unknown:
        parser.error(f"unknown table {unknown[0]!r}; expected one or more of {', '.join(TABLES)}")
    for name in names:
        print(f"{TABLES[name]()}\n")
    for page in PAGES if not names else ():
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
