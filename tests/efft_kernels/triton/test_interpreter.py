"""Triton's kernels on the CPU, in processes of their own: Triton decides once whether it interprets or compiles."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs the triton extra")
ROOT = Path(__file__).parents[3]


def interpreted(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with Triton's interpreter switched on."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    environment.pop("EFFT_BACKEND", None)
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("path", ["tests/efft_kernels/ops", "tests/efft_kernels/triton/kernels"])
def test_in_the_interpreter(path: str) -> None:
    """All tests of the ops, with the triton backend; and of single kernels, with every address checked."""
    done = interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no", path)
    *others, summary = done.stdout.strip().splitlines()
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", summary)[1])
    print(path, *(line for line in others if "compared with fp64" in line), summary, sep="\n")
    assert passed > 40
