"""Test the selection of an instruction set, and that the code for one set contains no code for another.

The kernels of the backend ``cpu`` are compiled once per instruction set. ``make check-isa`` runs the numerical tests
with each set that the processor supports, except the best one, which all other tests use.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from efft_kernels import build, native
from tests.csrc.cpu.check import ROOT, instruction_sets

pytestmark = pytest.mark.skipif(native.MISSING["cpu"] is not None, reason=native.MISSING["cpu"] or "")


def run(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "EFFT_CPU_ISA": isa, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_name_that_is_none_is_refused() -> None:
    program = (
        "from efft_kernels import testing, tt_linear; tt_linear(**testing.make_inputs('tt_linear'), backend='cpu')"
    )
    assert run("", "-c", program).returncode == 0
    done = run("sse9", "-c", program)
    assert done.returncode != 0
    assert "EFFT_CPU_ISA must be one of" in done.stderr
    assert "portable, got 'sse9'" in done.stderr


@pytest.mark.parametrize("isa", instruction_sets()[1:])
def test_lesser_sets(isa: str, request: pytest.FixtureRequest) -> None:
    """The pytest session that ``make check-isa`` starts uses the given set, and contains more than 80 tests."""
    if os.environ.get("EFFT_CPU_ISA") != isa:
        pytest.skip(f"make check-isa runs this test with EFFT_CPU_ISA={isa}; all other tests use the best set")
    assert native.instruction_set() == isa
    assert len(request.session.items) > 80


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm from binutils")
def test_no_function_is_shared_between_sets(tmp_path: Path) -> None:
    """If several sets define one name, the linker keeps only one function, which a processor may not support."""
    objects = tmp_path / "objects"
    build.build(["cpu"], tmp_path, objects)
    sets = {path.stem.removeprefix("cpu-"): path for path in objects.glob("cpu-*.o")}
    sets = {isa: path for isa, path in sets.items() if isa in build.isa_flags()}
    assert "portable" in sets
    for isa, path in sets.items():
        done = subprocess.run(["nm", "--defined-only", str(path)], capture_output=True, text=True, check=True)
        kinds = [line.split()[1:] for line in done.stdout.splitlines()]
        own = f"4efft{len(isa)}{isa}", "DW.ref."  # names with the second prefix are pointers for the unwinder, not code
        shared = [name for kind, name in kinds if kind in "TWVuDB" and not any(mark in name for mark in own)]
        assert any(kind in "TWVuDB" for kind, _ in kinds)
        assert not shared, f"{path.name} defines {shared}"
