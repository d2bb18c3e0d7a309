"""Implement ``efft bench``, which runs the benchmarks of a source checkout.

The package that pip installs does not contain the benchmarks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import efft

#: The root of the source checkout, if the package is imported from a checkout.
ROOT = Path(efft.__file__).parents[2]


def run(words: Sequence[str]) -> int:
    """Run ``python -m benchmarks`` with the arguments ``words`` and return its exit code.

    Raises:
        RuntimeError: efft is not imported from a source checkout.
    """
    if not (ROOT / "benchmarks" / "__main__.py").is_file():
        raise RuntimeError(
            f"`efft bench` runs the benchmarks of a source checkout, but efft is installed in {ROOT} without one; "
            "clone the repository and run pip install -e '.[dev]' in it"
        )
    path = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    return subprocess.run([sys.executable, "-m", "benchmarks", *words], env=environment).returncode
