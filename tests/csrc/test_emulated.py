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


def emulation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("emulation_build", HERE / "emulation" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


emulator = emulation()


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


KERNEL = "lowrank_gemm_sm90.cu"
#: A consumer writes an element of a buffer, its own value, and the next product reads it.
WRITE = (
    "{ volatile auto& one = reinterpret_cast<volatile uint16_t&>(shared.a[place.stage * P::BYTES_A / 2]); "
    "if (thread == 0) one = one; }\n"
)
#: (file, what it says, what a mistake would say, how it shows)
HOPPER_FAULTS = {
    "a buffer released before its products are done": (
        KERNEL,
        "warpgroup_wait<1>();",
        "warpgroup_wait<2>();",
        "overwrites what a product under way still reads",
    ),
    "the wrong phase of full buffers": (
        KERNEL,
        "shared.full[place.stage].wait(place.round);",
        "shared.full[place.stage].wait(place.round ^ 1);",
        "what a copy has not brought yet|deadlock|barrier",
    ),
    "the wrong phase of empty buffers": (
        KERNEL,
        "shared.empty[stage].wait(place.round ^ 1);",
        "shared.empty[stage].wait(place.round);",
        "deadlock",
    ),
    "phases that never change": (
        KERNEL,
        "      round ^= 1;\n",
        "",
        "deadlock|overwrites|not brought|two copies|more arrivals",
    ),
    "one block of the pair not waited for": (
        KERNEL,
        "shared.empty[stage].init(PAIR * P::GROUPS);",
        "shared.empty[stage].init(P::GROUPS);",
        "overwrites|more arrivals|not brought|two copies",
    ),
    "too few bytes expected": (
        KERNEL,
        "P::BYTES_A + P::BYTES_B + P::BYTES_P",
        "P::BYTES_A + P::BYTES_B",
        "not brought|deadlock",
    ),
    "a product in another swizzle than the copy": (
        KERNEL,
        "typename P::LayoutP{});\n  typename P::Mma mma;",
        "tile_to_shape(GMMA::Layout_K_SW64_Atom<typename P::T>{}, "
        "Shape<typename P::R, typename P::K, Int<STAGES>>{}));\n  typename P::Mma mma;",
        "WRONG",
    ),
    "lanes ahead of the one that copies": (
        KERNEL,
        "    __syncwarp();  // The other lanes",
        "    // The other lanes",
        "converged",
    ),
    "rows read before all lanes have written them": (
        KERNEL,
        "    __syncwarp();\n#pragma unroll\n    for (int half",
        "#pragma unroll\n    for (int half",
        "WRONG",
    ),
    "rows written before all lanes have read them": (
        KERNEL,
        "    __syncwarp();\n#pragma unroll\n    for (int j",
        "#pragma unroll\n    for (int j",
        "WRONG",
    ),
    "the last tile left out": (KERNEL, "tile < tiles.count();", "tile < tiles.count() - 1;", "WRONG"),
    "a tile of the next column": (KERNEL, "n = within / height;", "n = (within + 1) / height;", "WRONG"),
    "columns of H beyond the rank kept": (KERNEL, "< op.R ? h(i) : 0.0f", "< P::RANKS ? h(i) : 0.0f", "WRONG infinite"),
    "the tail left out": (
        KERNEL,
        "main_steps + blocks(op.R, typename P::K{})",
        "main_steps + op.R / 64",
        "WRONG|deadlock",
    ),
    "an output row too many": (
        KERNEL,
        "if (m < op.M && n < op.N)",
        "if (m <= op.M && n < op.N)",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "sums read before the products are done": (
        KERNEL,
        "      warpgroup_commit_batch();\n      warpgroup_wait<0>();\n",
        "      warpgroup_commit_batch();\n",
        "WRONG|under way",
    ),
    "registers not fenced before a product": (KERNEL, "      warpgroup_arrive();\n", "", "without a fence"),
    "barriers not fenced": (KERNEL, "    cutlass::arch::fence_barrier_init();\n", "", "before a fence"),
    "a block that starts before the other's barriers are there": (
        KERNEL,
        "  cluster_arrive_relaxed();\n  cluster_wait();  // the barriers",
        "  // the barriers",
        "no barrier|before a fence",
    ),
    "a block that ends before the other": (
        KERNEL,
        "  cluster_arrive();\n  cluster_wait();\n}",
        "}",
        "that has ended",
    ),
    "a write that products may not see": (
        KERNEL,
        "      warpgroup_arrive();\n",
        f"      {WRITE}      warpgroup_arrive();\n",
        "without a proxy fence",
    ),
}


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
