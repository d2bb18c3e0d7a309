"""Command-line options that the benchmarks share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

#: Types of numbers that training steps are measured in.
DTYPES = ("float32", "bfloat16")


def default_device() -> str:
    """``cuda`` if there is a GPU, otherwise ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def parser_of(command: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of ``python -m benchmarks COMMAND``, with only the option ``--results``.

    Args:
        command: its name, which is also that of the result file.
        description: the docstring of its module; the help shows it as it is.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--results", type=Path, metavar="FOLDER", help=f"folder for {command}.jsonl (default: benchmarks/results)"
    )
    return parser


def parser_of_measurement(
    command: str, description: str | None, dtypes: Sequence[str] = DTYPES
) -> argparse.ArgumentParser:
    """:func:`parser_of` with ``--dtype``, which defaults to ``dtypes``, and ``--device``."""
    parser = parser_of(command, description)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(dtypes))
    parser.add_argument("--device", default=default_device(), help="default: %(default)s")
    return parser
