"""The CUDA kernels on the CPU: a fiber for every thread, tensor-core and copy instructions by their documented layouts.

What runs is csrc/cuda itself, launchers and binding included, compiled against tests/csrc/emulation.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from efft_kernels.build import BuildError, find_tools

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

try:
    find_tools("cpu")
except BuildError as missing:
    pytest.skip(str(missing), allow_module_level=True)


def emulation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("emulation_build", HERE / "emulation" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


emulator = emulation()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulator.build(emulator.sources(), tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Of objects, sanitized or not: a planted fault compiles its own file again, and those that include it."""
    return {sanitize: tmp_path_factory.mktemp("objects") for sanitize in (False, True)}


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    variables = {**os.environ, "PYTHONPATH": path, **environment}
    variables.pop("EFFT_BACKEND", None)
    return subprocess.run([sys.executable, *arguments], env=variables, cwd=ROOT, capture_output=True, text=True)


def ragged(library: Path, family: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return python(str(HERE / "emulation" / "ragged.py"), str(library), family, **environment)


@pytest.fixture(scope="module")
def sanitized() -> dict[str, str]:
    options = "detect_leaks=0:protect_shadow_gap=0:detect_stack_use_after_return=0"
    return {"LD_PRELOAD": emulator.preload(find_tools("cpu").cxx), "ASAN_OPTIONS": options}


ORDERS = pytest.mark.parametrize("order", [{}, {"EFFT_EMULATION_REVERSE": "1"}], ids=["forward", "reverse"])


@pytest.mark.slow
@ORDERS
def test_every_op_on_ragged_sizes(library: Path, order: dict[str, str]) -> None:
    done = ragged(library, **order)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) cases, 0 wrong", done.stdout)[1]) > 200


@pytest.mark.skipif("EFFT_EMULATED_CUDA" not in os.environ, reason="make check-cuda runs it, with EFFT_EMULATED_CUDA")
def test_the_tests_of_the_ops(request: pytest.FixtureRequest) -> None:
    """The session that runs the tests of the ops on an emulated library holds all that the backend takes part in."""
    chosen = [item for item in request.session.items if item.path.is_relative_to(ROOT / "tests/efft_kernels/ops")]
    assert len(chosen) > 200


@pytest.mark.slow
@ORDERS
def test_addresses_and_undefined_behaviour(
    folders: dict[bool, Path], sanitized: dict[str, str], order: dict[str, str]
) -> None:
    done = ragged(emulator.build(emulator.sources(), folders[True], sanitize=True), **sanitized, **order)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]


#: (file, what it says, what a mistake would say, the family of cases that shows it, how)
FAULTS = {
    "no barrier before a buffer is filled again": (
        "lowrank_gemm.cu",
        "    __syncthreads();  // everybody's copies",
        "    // everybody's copies",
        "linear",
        "WRONG",
    ),
    "too few copies waited for": (
        "project.cu",
        "wait_copies<STAGES - 2>();",
        "wait_copies<STAGES - 1>();",
        "linear",
        "WRONG|copies under way",
    ),
    "no barrier between steps of a small product": (
        "small_product.cuh",
        "      __syncthreads();  // nobody reads the last step any more\n",
        "",
        "contract",
        "WRONG",
    ),
    "a barrier for some": (
        "small_product.cuh",
        "      __syncthreads();  // nobody reads",
        "      if (thread < 64) __syncthreads();  // nobody reads",
        "contract",
        "divergent barrier",
    ),
    "left matrices in the wrong order": (
        "accumulator.cuh",
        "a.chunk(m + matrix % 2 * 8 + row, k / 8 + matrix / 2)",
        "a.chunk(m + matrix / 2 * 8 + row, k / 8 + matrix % 2)",
        "linear",
        "WRONG .*bfloat16",
    ),
    "right matrices in the wrong order": (
        "accumulator.cuh",
        "b.chunk(k + matrix % 2 * 8 + row, n / 8 + matrix / 2)",
        "b.chunk(k + matrix / 2 * 8 + row, n / 8 + matrix % 2)",
        "linear",
        "WRONG .*bfloat16",
    ),
    "sums written in the wrong place": (
        "accumulator.cuh",
        "first_column() + 8 * j + lane() % 4 * 2",
        "first_column() + 8 * j + lane() % 8 * 2",
        "linear",
        "WRONG .*bfloat16|AddressSanitizer",
    ),
    "a row too many": (
        "tiles.cuh",
        "row + r < from.rows && left > 0",
        "row + r <= from.rows && left > 0",
        "linear",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "columns beyond the end": (
        "tiles.cuh",
        "(left < PER_CHUNK ? static_cast<int>(left) : PER_CHUNK)",
        "PER_CHUNK",
        "linear",
        "WRONG|AddressSanitizer",
    ),
    "an output row too many": (
        "lowrank_gemm.cu",
        "if (row >= op.M || column >= op.N) return;",
        "if (row > op.M || column >= op.N) return;",
        "linear",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "less shared memory than is used": (
        "project.cu",
        "static constexpr int BYTES = STAGES * STAGE",
        "static constexpr int BYTES = (STAGES - 1) * STAGE",
        "linear",
        "past the shared memory|AddressSanitizer",
    ),
    "the tail left out": (
        "lowrank_gemm.cu",
        "steps = main_steps + (op.R + K - 1) / K",
        "steps = main_steps + op.R / K",
        "update",
        "WRONG update",
    ),
    "the last range of tokens forgotten": (
        "reduce_tokens.cu",
        "split < op.splits; ++split)",
        "split < op.splits - (op.splits > 1); ++split)",
        "linear",
        "WRONG .* dG",
    ),
    "the slope of the other GELU": (
        "producers.cu",
        "if (which == Producer::gelu_tanh) {",
        "if (which != Producer::gelu_tanh) {",
        "gelu",
        "WRONG .* dx",
    ),
    "a mask of the wrong layer": (
        "contract.cu",
        "keep_V[(layer * r2 + j) * d_out + n]",
        "keep_V[j * d_out + n]",
        "contract",
        "WRONG .* dV",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(folders: dict[bool, Path], sanitized: dict[str, str], name: str) -> None:
    """In one of the two orders of threads; those of addresses by the sanitizers."""
    file, what, fault, family, how = FAULTS[name]
    sanitize = "AddressSanitizer" in how
    library = emulator.build(emulator.planted(file, what, fault), folders[sanitize], sanitize)
    for order in ({}, {"EFFT_EMULATION_REVERSE": "1"}):
        done = ragged(library, family, **order, **(sanitized if sanitize else {}))
        if done.returncode != 0:
            break
    said = done.stdout + done.stderr
    assert done.returncode != 0, f"not found: {said}"
    assert re.search(how, said), said[-5000:]
