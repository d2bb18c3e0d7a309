"""Define the command-line options that several benchmarks share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

#: The values that the option ``--dtype`` accepts.
DTYPES = ("float32", "bfloat16")


def default_device() -> str:
    """Return ``cuda`` if there is a GPU, otherwise ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def parser_of(command: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser for ``python -m benchmarks COMMAND`` that has only the option ``--results``.

    Args:
        command: name of the command and of its result file.
        description: docstring of the command's module; the help prints it unchanged.
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
    """Return :func:`parser_of` with the additional options ``--dtype`` and ``--device``.

    ``dtypes`` are the default values of ``--dtype``. The default of ``--device`` is :func:`default_device`.
    """
    parser = parser_of(command, description)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(dtypes))
    parser.add_argument("--device", default=default_device(), help="default: %(default)s")
    return parser
