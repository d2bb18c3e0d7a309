"""Test the CUDA kernels in an emulator on the CPU, which executes tensor-core and copy instructions as documented.

The tests compile csrc/cuda itself, including the functions that launch kernels and register ops, together with the
emulator in tests/csrc/emulation. The emulated GPU has compute capability 8.0 or, if nvcc and CUTLASS's headers are
installed, 9.0 ("Hopper", "sm_90"). "Second generation" means the kernels that EFFT_SM90_GENERATION=2 selects on compute
capability 9.0. The environment variables EFFT_EMULATION_* are described in tests/csrc/emulation/emulation.cpp, and the
families of cases in tests/csrc/emulation/ragged.py.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import steps, steps_mlp
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
faults, pingpong_faults = emulation("faults"), emulation("pingpong_faults")
FAULTS, HOPPER_FAULTS, KERNEL, WRITE = faults.FAULTS, faults.HOPPER_FAULTS, faults.KERNEL, faults.WRITE
SECOND_FAULTS, THIRD_FAULTS, PINGPONG = faults.SECOND_FAULTS, pingpong_faults.THIRD_FAULTS, pingpong_faults.PINGPONG

HOPPER = emulator.runs_hopper()
on_hopper = pytest.mark.skipif(not HOPPER, reason="nvcc or CUTLASS's headers are missing")
#: The environment of a run on the kernels of compute capability 9.0.
SM90 = {"EFFT_EMULATION_CAPABILITY": "9"}
SECOND, THIRD = ({**SM90, "EFFT_SM90_GENERATION": generation} for generation in "23")
#: The environment and the steps of the model in benchmarks/steps.py for each generation of kernels.
GENERATIONS = [(SM90, ""), (SECOND, steps.SECOND_GENERATION), (THIRD, steps.THIRD_GENERATION)]
each_generation = pytest.mark.parametrize(
    ("kernels", "changes"), GENERATIONS, ids=[f"{which} generation" for which in ("first", "second", "third")]
)
#: With more multiprocessors, sums over tokens are divided into more ranges.
MANY_RANGES = {**SECOND, "EFFT_EMULATION_PROCESSORS": "16"}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulator.build(emulator.sources(HOPPER), tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Return one folder for objects that use sanitizers (True), and one for objects that do not (False).

    The tests share these folders, so that a test that plants a fault compiles only a part of the files again.
    """
    return {sanitize: tmp_path_factory.mktemp("objects") for sanitize in (False, True)}


def test_objects_are_compiled_again_if_anything_changed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled: list[str] = []

    def run(*command: str) -> str:
        if "-c" in command:
            compiled.append(Path(command[command.index("-c") + 1]).name)
            assert (tmp_path / compiled[-1]).read_text() != "an error"
        return ""

    def compiled_by(files: dict[str, str]) -> list[str]:
        compiled.clear()
        emulator.build(files, tmp_path)
        return sorted(name for name in compiled if name in files)

    monkeypatch.setattr(emulator, "_run", run)
    monkeypatch.setattr(emulator, "hopper", lambda: emulator.Hopper(tmp_path, tmp_path))
    first = {"a.cu": "", "b.cu": '#include "b.cuh"', "b.cuh": ""}
    assert compiled_by(first) == ["a.cu", "b.cu"]
    assert compiled_by(first) == []
    assert compiled_by({**first, "b.cuh": "//"}) == ["b.cu"]
    # The flags of all files depend on whether there are kernels for compute capability 9.0.
    assert compiled_by({"a.cu": "", "c_sm90.cu": ""}) == ["a.cu", "c_sm90.cu"]
    with pytest.raises(AssertionError):
        compiled_by({"a.cu": "an error", "c_sm90.cu": ""})
    assert compiled_by({"a.cu": "", "c_sm90.cu": ""}) == ["a.cu"]


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


@pytest.mark.skipif("EFFT_EMULATED_CUDA" not in os.environ, reason="only make check-cuda sets EFFT_EMULATED_CUDA")
def test_the_tests_of_the_ops(request: pytest.FixtureRequest) -> None:
    """The session in which ``make check-cuda`` tests the ops on an emulated library must contain these tests."""
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
    """The emulator reports each fault in one of two orders of threads; the sanitizers report wrong addresses."""
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


# The following tests need compute capability 9.0.

#: The numbers of instances of the kernels. lowrank_gemm_sm90.cu computes or reads h, and has two orders of the right
#: operand, two sizes of tiles and two dtypes; in the second generation it also computes h with at most half as many
#: columns. lowrank_gemm_pingpong_sm90.cu has as many instances as the second generation. reduce_tokens_sm90.cu has
#: three ranks and three dtypes.
INSTANCES, PRODUCTS_OF_SECOND, PRODUCTS_OF_THIRD, SUMS_OF_SECOND = 16, 24, 24, 9
HOPPER_ORDERS = pytest.mark.parametrize(
    "order",
    [{}, {"EFFT_EMULATION_REVERSE": "1"}, *({"EFFT_EMULATION_SEED": str(seed)} for seed in SEEDS)],
    ids=["forward", "reverse", *(f"seed {seed}" for seed in SEEDS)],
)


@pytest.mark.slow
@on_hopper
@HOPPER_ORDERS
def test_every_op_on_ragged_sizes_on_sm90(library: Path, order: dict[str, str]) -> None:
    """All results are correct with the kernels for compute capability 9.0, and every instance of these kernels runs."""
    done = ragged(library, **SM90, **order)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) cases, 0 wrong", done.stdout)[1]) > 300
    assert int(re.search(r"kernels run, (\d+) of them in clusters", done.stdout)[1]) == INSTANCES


def names_of_kernels_run(library: Path, **environment: str) -> set[str]:
    """Run all cases, check that no result is wrong, and return the names of the kernels that ran."""
    done = ragged(library, **environment, EFFT_EMULATION_LOG="1")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) cases, 0 wrong", done.stdout)[1]) > 350
    names = symbols(library)
    return {names[int(place)] for place in re.search(r"kernels: (.*)", done.stdout)[1].split()}


@pytest.mark.slow
@on_hopper
@HOPPER_ORDERS
def test_the_second_generation_on_sm90(library: Path, order: dict[str, str]) -> None:
    """All results are correct with the second generation of kernels, and every instance of these kernels runs."""
    run = names_of_kernels_run(library, **SECOND, **order)
    assert sum("lowrank_gemm_sm90_kernel" in name for name in run) == PRODUCTS_OF_SECOND
    assert sum("reduce_tokens_sm90_kernel" in name for name in run) == SUMS_OF_SECOND
    assert not any("finish_kernel" in name for name in run)


@pytest.mark.slow
@on_hopper
@HOPPER_ORDERS
def test_the_third_generation_on_sm90(library: Path, order: dict[str, str]) -> None:
    """All results are correct with the third generation of kernels, and every instance of its product runs."""
    run = names_of_kernels_run(library, **THIRD, **order)
    assert sum("lowrank_gemm_pingpong_sm90_kernel" in name for name in run) == PRODUCTS_OF_THIRD
    assert sum("reduce_tokens_sm90_kernel" in name for name in run) == SUMS_OF_SECOND
    assert not any("lowrank_gemm_sm90_kernel" in name for name in run)


@pytest.mark.slow
@on_hopper
def test_an_unknown_generation_is_refused(library: Path) -> None:
    """The library checks the variable as well, because it may change after Python has read it."""
    program = (
        "import os, torch, efft_kernels.ops\n"
        f"torch.ops.load_library({str(library)!r})\n"
        "os.environ['EFFT_SM90_GENERATION'] = '4'\n"
        "torch.ops.efft.tt_merge_.cuda(torch.ones(8, 8), torch.ones(8, 1), torch.ones(1, 8), 1.0)\n"
    )
    done = python("-c", program)
    assert done.returncode != 0
    assert "expected EFFT_SM90_GENERATION to be 1, 2 or 3, got '4'" in done.stderr, done.stderr


@pytest.mark.slow
@on_hopper
@HOPPER_ORDERS
def test_sums_in_many_ranges_of_tokens(library: Path, order: dict[str, str]) -> None:
    done = ragged(library, "sums", **MANY_RANGES, **order)
    assert done.returncode == 0, done.stdout + done.stderr


def symbols(library: Path) -> dict[int, str]:
    """Return the names of the functions of a library by their distance in bytes from its start."""
    said = subprocess.run(["nm", "-C", "--defined-only", str(library)], capture_output=True, text=True, check=True)
    lines = (line.split(maxsplit=2) for line in said.stdout.splitlines())
    return {int(place, 16): name for place, _, name in lines}


def launched(
    library: Path, form: str, *arguments: int, **environment: str
) -> dict[tuple[int, str], list[tuple[str, ...]]]:
    """Return the launches of forward and backward calls of several layers or MLPs.

    Args:
        library: the emulated kernels.
        form: the argument FORM of tests/csrc/emulation/block.py.
        arguments: further arguments of tests/csrc/emulation/block.py: tokens, rank, packed, and sizes of the layers.
        environment: further variables of the environment.

    Returns:
        For each (number of the layer, "fwd" or "bwd") the launches as (kernel, whether the launch is dependent, bytes).
    """
    script = str(HERE / "emulation" / "block.py")
    done = python(script, str(library), form, *(str(int(argument)) for argument in arguments), **environment)
    assert done.returncode == 0, done.stderr
    names = symbols(library)

    def short(place: int) -> str:
        name = re.search(r"(\w+)_kernel", names[place])[1]
        return name.replace("reduce_tokens_sm90", "reduce_tokens").replace("gemm_pingpong", "gemm")

    lines = map(json.loads, done.stdout.splitlines())
    return {
        (layer, direction): [(short(place), dependent, size) for place, _, dependent, size in of]
        for layer, direction, of in lines
    }


@pytest.mark.slow
@on_hopper
@each_generation
def test_the_launches_of_a_block_are_those_of_the_model(library: Path, kernels: dict[str, str], changes: str) -> None:
    """The emulated GPU has 132 multiprocessors. The kernels of a ViT-B block with 12608 tokens do not run."""
    sizes = [size for layer in steps.LAYERS.values() for size in layer]
    dry = {"EFFT_EMULATION_DRY": "1", "EFFT_EMULATION_PROCESSORS": "132"}
    found = launched(library, "linear", steps.TOKENS, steps.RANK, bool(changes), *sizes, **kernels, **dry)
    for i, layer in enumerate(steps.LAYERS.values()):
        for direction in steps.PASSES:
            modeled = steps.launches(steps.Sizes(steps.TOKENS, *layer, steps.RANK), direction, changes)
            assert [kernel for kernel, _, _ in found[i, direction]] == [launch.kernel for launch in modeled]
            assert all(dependent == bool(changes) for _, dependent, _ in found[i, direction])
    assert sum(map(len, found.values())) == steps.counts(changes)[0] == (12 if changes else 27)


@pytest.mark.slow
@on_hopper
@each_generation
def test_the_bytes_of_each_launch_are_those_of_the_model(library: Path, kernels: dict[str, str], changes: str) -> None:
    """The two layers are small enough to emulate. Some of the products compute h, and others read it."""
    tokens, rank, wide, narrow, processors = 1300, 16, 2304, 64, 20
    environment = {"EFFT_EMULATION_COUNT": "1", "EFFT_EMULATION_PROCESSORS": str(processors)}
    sizes = (narrow, wide, wide, narrow)
    found = launched(library, "linear", tokens, rank, bool(changes), *sizes, **kernels, **environment)
    for layer, (d_in, d_out) in enumerate(zip(sizes[::2], sizes[1::2], strict=True)):
        for direction in steps.PASSES:
            of = steps.Sizes(tokens, d_in, d_out, rank)
            modeled = steps.launches(of, direction, changes, processors)
            counted = [(kernel, size) for kernel, _, size in found[layer, direction]]
            assert counted == [(launch.kernel, launch.bytes) for launch in modeled], (layer, direction)


@pytest.mark.slow
@on_hopper
@each_generation
@pytest.mark.parametrize("form", ["fused", "mlp"])
def test_the_launches_of_an_mlp_are_those_of_the_model(
    library: Path, form: str, kernels: dict[str, str], changes: str
) -> None:
    """The first MLP is that of a ViT-B block, on 132 multiprocessors, and its kernels do not run.

    The second MLP is small enough to count the bytes of its launches.
    """
    dry = {"EFFT_EMULATION_DRY": "1", "EFFT_EMULATION_PROCESSORS": "132"}
    found = launched(library, form, steps.TOKENS, steps.RANK, bool(changes), *steps.LAYERS["fc1"], **kernels, **dry)
    for direction in steps.PASSES:
        modeled = [part.launch for way, part in steps_mlp.of_mlp(form, changes) if way == direction]
        assert [kernel for kernel, _, _ in found[0, direction]] == [launch.kernel for launch in modeled]
    tokens, width, hidden, rank, processors = 1304, 256, 768, 16, 20
    environment = {"EFFT_EMULATION_COUNT": "1", "EFFT_EMULATION_PROCESSORS": str(processors)}
    found = launched(library, form, tokens, rank, bool(changes), width, hidden, **kernels, **environment)
    for direction in steps.PASSES:
        parts = steps_mlp.launches(tokens, width, hidden, rank, form, direction, changes, processors)
        counted = [(kernel, size) for kernel, _, size in found[0, direction]]
        assert counted == [(part.launch.kernel, part.launch.bytes) for part in parts], direction


PRODUCT_BY_TYPE = """op.A.type == Type::bfloat16 ? launch_type<cutlass::bfloat16_t, bf16>(op, stream)
                                     : launch_type<cutlass::half_t, fp16>(op, stream)"""


def few_instances() -> dict[str, str]:
    """Return the sources with a quarter of the instances of the first two generations, so that they compile faster.

    The instances have one dtype and one tile size. The product of the third generation has no instances.
    """
    files = emulator.sources(with_hopper=True)
    one_type = "launch_type<cutlass::bfloat16_t, bf16>(op, stream)"
    tiles = "return is_square ? launch_product<Square, Out>(op, stream) : launch_product<Wide, Out>(op, stream)"
    files = emulator.planted(files, KERNEL, PRODUCT_BY_TYPE, one_type)
    files = emulator.planted(files, PINGPONG, PRODUCT_BY_TYPE, "cudaErrorInvalidValue")
    return emulator.planted(files, KERNEL, tiles, "return launch_product<Wide, Out>(op, stream)")


def few_instances_of_third() -> dict[str, str]:
    """Return the sources with the wide bfloat16 tiles of the third generation, and without the products before it."""
    files = emulator.sources(with_hopper=True)
    one_type = "launch_type<cutlass::bfloat16_t, bf16>(op, stream)"
    tiles = """return wave_cost<Wide>(op) <= wave_cost<Narrow>(op) ? launch_product<Wide, Out>(op, stream)
                                                      : launch_product<Narrow, Out>(op, stream);"""
    files = emulator.planted(files, KERNEL, PRODUCT_BY_TYPE, "cudaErrorInvalidValue")
    files = emulator.planted(files, PINGPONG, PRODUCT_BY_TYPE, one_type)
    return emulator.planted(files, PINGPONG, tiles, "return launch_product<Wide, Out>(op, stream);")


def find_in_some_order(library: Path, family: str, how: str, **environment: str) -> None:
    """Run the cases of one family in several orders of threads, copies and products until one order fails.

    Args:
        library: the emulated kernels with a planted fault.
        family: the cases to run.
        how: a regular expression for the message, which the failed run must print.
        environment: further variables of the environment.
    """
    for order in ({}, {"EFFT_EMULATION_REVERSE": "1"}, *({"EFFT_EMULATION_SEED": str(seed)} for seed in SEEDS)):
        done = ragged(library, family, **environment, **order)
        if done.returncode != 0:
            break
    said = done.stdout + done.stderr
    assert done.returncode != 0, f"not found: {said}"
    print(f"found with {order or 'threads in order'}")
    assert re.search(how, said), said[-5000:]


@pytest.mark.slow
@on_hopper
@pytest.mark.parametrize("name", HOPPER_FAULTS)
def test_planted_faults_of_sm90_are_found(folders: dict[bool, Path], sanitized: dict[str, str], name: str) -> None:
    """The emulator reports each fault in one of several orders; the sanitizers report wrong addresses."""
    file, what, fault, how = HOPPER_FAULTS[name]
    sanitize = "AddressSanitizer" in how
    library = emulator.build(emulator.planted(few_instances(), file, what, fault), folders[sanitize], sanitize)
    find_in_some_order(library, "tiles bfloat16", how, **SM90, **(sanitized if sanitize else {}))


@pytest.mark.slow
@on_hopper
@pytest.mark.parametrize("name", SECOND_FAULTS)
def test_planted_faults_of_the_second_generation_are_found(
    folders: dict[bool, Path], sanitized: dict[str, str], name: str
) -> None:
    """The emulator reports each fault in one of several orders; the sanitizers report wrong addresses."""
    file, what, fault, family, how = SECOND_FAULTS[name]
    sanitize = "AddressSanitizer" in how
    library = emulator.build(emulator.planted(few_instances(), file, what, fault), folders[sanitize], sanitize)
    environment = MANY_RANGES if family == "sums" else SECOND
    find_in_some_order(library, family, how, **environment, **(sanitized if sanitize else {}))


@pytest.mark.slow
@on_hopper
@pytest.mark.parametrize("name", THIRD_FAULTS)
def test_planted_faults_of_the_third_generation_are_found(
    folders: dict[bool, Path], sanitized: dict[str, str], name: str
) -> None:
    """The emulator reports each fault in one of several orders; the sanitizers report wrong addresses."""
    file, what, fault, family, how = THIRD_FAULTS[name]
    sanitize = "AddressSanitizer" in how
    library = emulator.build(emulator.planted(few_instances_of_third(), file, what, fault), folders[sanitize], sanitize)
    find_in_some_order(library, family, how, **THIRD, **(sanitized if sanitize else {}))


@pytest.mark.slow
@on_hopper
def test_a_fenced_write_is_no_fault(folders: dict[bool, Path]) -> None:
    """The fault "a write that products may not see" disappears if a proxy fence follows the write."""
    fenced = f"      {WRITE}      cutlass::arch::fence_view_async_shared();\n      warpgroup_arrive();\n"
    files = emulator.planted(few_instances(), KERNEL, "      warpgroup_arrive();\n", fenced)
    done = ragged(emulator.build(files, folders[False]), "tiles bfloat16", **SM90, EFFT_EMULATION_SEED="1")
    assert done.returncode == 0, done.stdout + done.stderr
