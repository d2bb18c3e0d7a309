"""Test that the sanitizers of ``make check-native`` report an error with its location.

The error is planted in a copy of the sources.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.csrc.cpu.check import ROOT, build_sanitized, instruction_sets, sanitized

#: A line of low_rank.h, and a modification that writes one float past the end of a buffer.
RIGHT = "store(target + j, load(source + j, count), count); });"
MISTAKE = f"{RIGHT} target[columns] = 0;"


def test_instruction_sets_end_with_what_every_processor_has() -> None:
    assert instruction_sets()[-1] == "portable"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_planted_mistake_is_reported_with_file_and_line(tmp_path: Path) -> None:
    for folder in ("csrc", "efft_kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    source = tmp_path / "csrc" / "cpu" / "low_rank.h"
    before, found, after = source.read_text().partition(RIGHT)
    assert found, "low_rank.h no longer has the line into which the mistake is planted"
    source.write_text(before + MISTAKE + after)
    build_sanitized(tmp_path, tmp_path / "cache")
    program = (
        "import torch, efft_kernels\n"
        "from efft_kernels import testing\n"
        "inputs = testing.make_inputs('tt_linear', dtype=torch.bfloat16)\n"
        "efft_kernels.tt_linear(**inputs, backend='cpu')\n"
    )
    environment = sanitized(tmp_path, tmp_path / "cache", "portable")
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr[-2000:]
    assert f"low_rank.h:{before.count(chr(10)) + 1}" in done.stderr, done.stderr[-2000:]
