"""The CUDA kernels on the CPU: a fiber for every thread, tensor-core and copy instructions by their documented layouts.

What runs is csrc/cuda itself, launchers and binding included, compiled against tests/csrc/emulation: as on a GPU of
compute capability 8.0 and, where nvcc and CUTLASS's headers are at hand, of 9.0.
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


def emulation(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"emulation_{name}", HERE / "emulation" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


emulator = emulation("build")
faults = emulation("faults")
FAULTS, HOPPER_FAULTS, KERNEL, WRITE = faults.FAULTS, faults.HOPPER_FAULTS, faults.KERNEL, faults.WRITE

HOPPER = emulator.runs_hopper()
on_hopper = pytest.mark.skipif(not HOPPER, reason="nvcc or CUTLASS's headers are missing")
#: The environment of a run on the kernels of compute capability 9.0.
SM90 = {"EFFT_EMULATION_CAPABILITY": "9"}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulator.build(emulator.sources(HOPPER), tmp_path_factory.mktemp("emulated"))


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


SEEDS = (1, 2, 3)
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
    done = ragged(emulator.build(emulator.sources(False), folders[True], sanitize=True), **sanitized, **order)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(folders: dict[bool, Path], sanitized: dict[str, str], name: str) -> None:
    """In one of the two orders of threads; those of addresses by the sanitizers."""
    file, what, fault, family, how = FAULTS[name]
    sanitize = "AddressSanitizer" in how
    files = emulator.planted(emulator.sources(False), file, what, fault)
    library = emulator.build(files, folders[sanitize], sanitize)
    for order in ({}, {"EFFT_EMULATION_REVERSE": "1"}):
        done = ragged(library, family, **order, **(sanitized if sanitize else {}))
        if done.returncode != 0:
            break
    said = done.stdout + done.stderr
    assert done.returncode != 0, f"not found: {said}"
    assert re.search(how, said), said[-5000:]


# Compute capability 9.0.

#: Of lowrank_gemm_sm90.cu: h made or read, the right operand in either order, two tiles, two types; in the second
#: generation h is also made beside half as many columns.
INSTANCES, INSTANCES_OF_BOTH = 16, 24
HOPPER_ORDERS = pytest.mark.parametrize(
    "order",
    [{}, {"EFFT_EMULATION_REVERSE": "1"}, *({"EFFT_EMULATION_SEED": str(seed)} for seed in SEEDS)],
    ids=["forward", "reverse", *(f"seed {seed}" for seed in SEEDS)],
)


@pytest.mark.slow
@on_hopper
@HOPPER_ORDERS
def test_every_op_on_ragged_sizes_on_sm90(library: Path, order: dict[str, str]) -> None:
    """The kernels of 9.0 take what they can take of the same cases, and every instance of theirs runs."""
    done = ragged(library, **SM90, **order)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) cases, 0 wrong", done.stdout)[1]) > 300
    assert int(re.search(r"kernels run, (\d+) of them in clusters", done.stdout)[1]) == INSTANCES


@pytest.mark.slow
@on_hopper
def test_the_second_generation_on_sm90(library: Path) -> None:
    """The same cases with the kernels that no device has run yet."""
    done = ragged(library, **SM90, EFFT_SM90_GENERATION="2", EFFT_EMULATION_SEED="1")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"kernels run, (\d+) of them in clusters", done.stdout)[1]) == INSTANCES_OF_BOTH


def few_instances() -> dict[str, str]:
    """The sources with a fourth of the instances, which compile faster: one type, one tile."""
    files = emulator.sources(with_hopper=True)
    types = """op.A.type == Type::bfloat16 ? launch_order<cutlass::bfloat16_t, bf16>(op, stream)
                                     : launch_order<cutlass::half_t, fp16>(op, stream)"""
    tiles = """wave_cost(op, 192, 192) < wave_cost(op, 128, 256)
             ? launch_product<Product<T, TRANSPOSED, 3, 192, RANKS>, Out>(op, stream)
             : launch_product"""
    files = emulator.planted(
        files, "lowrank_gemm_sm90.cu", types, "launch_order<cutlass::bfloat16_t, bf16>(op, stream)"
    )
    return emulator.planted(files, "lowrank_gemm_sm90.cu", tiles, "(void)&wave_cost, launch_product")


@pytest.mark.slow
@on_hopper
@pytest.mark.parametrize("name", HOPPER_FAULTS)
def test_planted_faults_of_sm90_are_found(folders: dict[bool, Path], sanitized: dict[str, str], name: str) -> None:
    """In one of the orders of threads, copies and products; those of addresses by the sanitizers."""
    file, what, fault, how = HOPPER_FAULTS[name]
    sanitize = "AddressSanitizer" in how
    library = emulator.build(emulator.planted(few_instances(), file, what, fault), folders[sanitize], sanitize)
    for order in ({}, {"EFFT_EMULATION_REVERSE": "1"}, *({"EFFT_EMULATION_SEED": str(seed)} for seed in SEEDS)):
        done = ragged(library, "tiles bfloat16", **SM90, **order, **(sanitized if sanitize else {}))
        if done.returncode != 0:
            break
    said = done.stdout + done.stderr
    assert done.returncode != 0, f"not found: {said}"
    print(f"found with {order or 'threads in order'}")
    assert re.search(how, said), said[-5000:]


@pytest.mark.slow
@on_hopper
def test_a_fenced_write_is_no_fault(folders: dict[bool, Path]) -> None:
    """What the last planted fault lacks: with a fence the write, which changes nothing, is seen."""
    fenced = f"      {WRITE}      cutlass::arch::fence_view_async_shared();\n      warpgroup_arrive();\n"
    files = emulator.planted(few_instances(), KERNEL, "      warpgroup_arrive();\n", fenced)
    done = ragged(emulator.build(files, folders[False]), "tiles bfloat16", **SM90, EFFT_EMULATION_SEED="1")
    assert done.returncode == 0, done.stdout + done.stderr
