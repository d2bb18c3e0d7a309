"""Test how the CUDA library is built, that torch loads it without a GPU, and that the resource report finds faults."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from efft_kernels import build
from efft_kernels.backends import OPERATORS
from efft_kernels.build import BuildError, Tools, find_tools
from tests.csrc import resource_report
from tests.csrc.resource_report import Report, faults, inspect, main, read

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tools() -> Tools:
    try:
        return find_tools("cuda")
    except BuildError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def tools_of_report(tools: Tools) -> Tools:
    try:
        resource_report.find_tool("nvdisasm", tools)
    except BuildError as missing:
        pytest.skip(str(missing))
    return tools


def kernels(name: str, tools: Tools) -> tuple[Path, list[str]]:
    return next((path, flags) for path, flags in build.cuda_sources(tools.cutlass) if path.name == name)


@pytest.mark.slow
def test_a_library_loads_without_a_gpu_and_registers_every_op(tools: Tools, tmp_path: Path) -> None:
    (library,) = build.build(["cuda"], tmp_path / "lib", ROOT / "build" / "csrc")
    assert library.name == build.library_name("cuda")
    program = (
        "import torch, efft_kernels\n"
        f"torch.ops.load_library({str(library)!r})\n"
        f"for op in {OPERATORS}:\n"
        "    assert torch._C._dispatch_has_kernel_for_dispatch_key(f'efft::{op}.cuda', 'CUDA'), op\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(tmp_path)},  # a cache without other libraries
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_an_explicit_wish_that_cannot_be_met_fails_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    try:
        find_tools("cpu")
    except BuildError as missing:
        pytest.skip(str(missing))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(BuildError, match=r"^EFFT_BUILD_EXT=cuda: nvcc not found: install the CUDA toolkit"):
        build.plan("cuda")
    assert any("cuda: not built: nvcc not found" in line for line in build.plan("auto")[1])


def test_it_is_not_built_without_the_kernel_of_sm90(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_cutlass", lambda: None)
    with pytest.raises(BuildError, match="CUTLASS's headers not found: pip install --no-deps nvidia-cutlass"):
        build.plan("cuda")
    targets, summary = build.plan("auto")
    assert targets == ["cpu"]
    assert "cuda: not built: CUTLASS's headers not found" in summary[-1]


def test_the_sm90_kernel_is_compiled_for_sm90_alone(tmp_path: Path) -> None:
    flags = {path.name: flags for path, flags in build.cuda_sources(tmp_path)}
    assert "-DEFFT_SM90" in flags["lowrank_gemm.cu"]
    assert [f for f in flags["lowrank_gemm_sm90.cu"] if "gencode" in f] == ["-gencode=arch=compute_90a,code=sm_90a"]
    assert "-gencode=arch=compute_80,code=[sm_80,compute_80]" in flags["project.cu"]


# The output of nvdisasm (CODE) and of nvcc with ptxas -v (SAID) for one kernel, for tests of the report.

CODE = """
	.section	.text._Z7projectv,"ax",@progbits
        /*0000*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
        /*0010*/              @!P0 HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/                   LDSM.16.M88.4 R8, [R20] ;
"""
SAID = """ptxas info    : Compiling entry function '_Z7projectv' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 1024 bytes smem
"""
PRODUCT = "project_kernel<__half, __half, 32, false>"


def test_what_is_read() -> None:
    (found,) = read(SAID, CODE, "80")
    assert (found.kernel, found.registers, found.stack, found.spills) == ("project()", 96, 0, 0)
    assert found.shared_memory == 1024
    counts = {"all": 3, "HMMA": 1, "LDGSTS": 1, "LDSM": 1}
    assert {kind: count for kind, count in found.instructions.items() if count} == counts
    assert faults(replace(found, kernel=PRODUCT), SAID) == []


def test_dynamic_shared_memory_is_read_from_the_list_of_kernels() -> None:
    symbols = (
        "0bf5 b efft::listed<&(void efft::(anonymous namespace)::reduce_tokens_kernel<efft::bf16, 128>"
        "(efft::ReduceTokens)), 98304ul>\n"
        "0bf6 b efft::listed<&efft::(anonymous namespace)::merge_kernel, 12416ul>\n"
        "0bf7 b guard variable for efft::something\n"
    )
    found = {"reduce_tokens_kernel<__nv_bfloat16,128>": 98304, "merge_kernel": 12416}
    assert resource_report.dynamic_shared(symbols) == found


@pytest.mark.parametrize(
    ("change", "said", "fault"),
    [
        ({"spills": 8}, "", "8 bytes spilled"),
        ({"stack": 16}, "", "16 bytes of stack"),
        ({"shared_memory": 50000}, "", "50000 bytes of static shared memory"),
        ({"registers": -1}, "", "nothing could be read"),
        ({"instructions": {"all": 9, "LDGSTS": 1, "LDSM": 1}}, "", "no HMMA instruction"),
        ({"instructions": {"all": 9, "HMMA": 1, "LDSM": 1}}, "", "no LDGSTS instruction"),
        ({"kernel": "lowrank_gemm_sm90_kernel<>"}, "", "no HGMMA instruction"),
        ({"kernel": "lowrank_gemm_sm90_kernel<>"}, "", "no TMA instruction"),
        ({"kernel": "lowrank_gemm_pingpong_sm90_kernel<>"}, "", "no STSM instruction"),
        ({}, "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async are serialized", "C7510"),
    ],
)
def test_what_is_a_fault(change: dict[str, object], said: str, fault: str) -> None:
    instructions = {"all": 9, "HMMA": 1, "LDGSTS": 1, "LDSM": 1}
    report = replace(Report(PRODUCT, "80", 96, 0, 0, 0, instructions), **change)
    assert any(fault in found for found in faults(report, said)), faults(report, said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "what", "instead", "fault"),
    [
        ("accumulator.cuh", "multiply_add<T>(sums_[i][j], left[i], of_tile);", "(void)of_tile;", "no HMMA instruction"),
        (
            "lowrank_gemm.cu",
            "constexpr int STAGES = 4;",
            "constexpr int STAGES = 7;",
            "more shared memory than a block",
        ),
        ("lowrank_gemm.cu", "__launch_bounds__(Sums::THREADS)", "__launch_bounds__(Sums::THREADS, 4)", "bytes spilled"),
        ("lowrank_gemm.cu", "sums.add(left(step)", "sums.adds(left(step)", "does not compile"),
    ],
    ids=["no products", "too many stages", "too few registers", "an error"],
)
def test_planted_faults_are_reported(
    tools_of_report: Tools, tmp_path: Path, file: str, what: str, instead: str, fault: str
) -> None:
    folder = shutil.copytree(build.sources() / "cuda", tmp_path / "cuda")
    text = (folder / file).read_text()
    assert what in text
    (folder / file).write_text(text.replace(what, instead))
    reports = inspect(folder / "lowrank_gemm.cu", [], "80", tools_of_report)
    assert any(fault in found for report in reports for found in report.faults), reports


@pytest.mark.slow
@pytest.mark.parametrize("target", resource_report.TARGETS)
@pytest.mark.usefixtures("tools_of_report")
def test_no_kernel_has_a_fault(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--targets", target])
    said = capsys.readouterr().out
    print(said)
    assert code == 0, said
    assert ("lowrank_gemm_sm90_kernel" in said) == (target == "90a")


def test_the_command_needs_nvcc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        resource_report, "find_tools", lambda target: (_ for _ in ()).throw(BuildError("nvcc not found"))
    )
    with pytest.raises(SystemExit):
        main([])
    assert "nvcc not found" in capsys.readouterr().err
