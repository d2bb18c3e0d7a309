"""Compile every kernel with every entry of the tables for every target, and test that the report finds faults."""

from __future__ import annotations

from dataclasses import replace

import pytest

triton = pytest.importorskip("triton", reason="needs the triton extra")

if triton.knobs.runtime.interpret:
    pytest.skip("with TRITON_INTERPRET=1, Triton cannot compile kernels", allow_module_level=True)

from tests.efft_kernels.triton.resource_report import (  # noqa: E402
    PARKED,
    SHARED_MEMORY,
    Form,
    Report,
    forms,
    inspect,
    inspect_all,
    judge,
    main,
    read_sass,
    table,
)

pytestmark = pytest.mark.slow  # compiles every kernel for every target


def form(name: str) -> Form:
    return next(f for f in forms() if f.name == name)


FAST = "lowrank_gemm_tma bf16 128x256x64 forward"


def test_no_fault_on_any_target() -> None:
    reports = inspect_all(forms(), list(SHARED_MEMORY))
    print(table(reports))
    assert not {f"{r.form} on {r.target}": r.faults for r in reports if r.faults}
    compiled = [r for r in reports if r.skipped is None]
    assert len(compiled) > 0.7 * len(reports)
    assert all(any(r.target == target for r in compiled) for target in SHARED_MEMORY)


def test_the_estimate_of_shared_memory_is_not_too_low() -> None:
    """With too low an estimate, the launch code would choose a tile that cannot be launched."""
    for name in (
        FAST,
        "lowrank_gemm bf16 128x128x32 backward",
        "lowrank_gemm fp32 tf32 128x128x32 forward",
    ):
        chosen = form(name)
        assert chosen.estimate is not None
        assert inspect(chosen, "90").shared_memory <= chosen.estimate


def test_a_form_that_a_target_never_gets_is_not_compiled() -> None:
    large = form("lowrank_gemm bf16 128x256x64 forward")
    assert "never chosen: needs 147456 bytes" in str(inspect(large, "89").skipped)
    assert "compute capability 9.0" in str(inspect(large, "80").skipped)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"warps": 4}, "accesses to spilled registers in loops"),
        ({"stages": 6}, "bytes of shared memory, but the target has 232448"),
        ({"types": {**form(FAST).types, "A": "tensordesc<fp32[128, 64]>"}}, "does not compile"),
    ],
    ids=["too few warps", "too many stages", "mixed dtypes"],
)
def test_planted_faults_are_found(changes: dict[str, object], fault: str) -> None:
    report = inspect(replace(form(FAST), estimate=None, **changes), "90")
    assert any(fault in found for found in report.faults), report


@pytest.mark.parametrize(("spills", "faulty"), [(PARKED, False), (PARKED + 1, True)])
def test_a_few_spilled_registers_outside_of_loops_are_allowed(spills: int, faulty: bool) -> None:
    report = Report(FAST, "90", registers=100, spills=spills, instructions={"all": 9, "HGMMA": 1, "TMA": 1})
    judge(report, form(FAST))
    fault = f"{spills} accesses to spilled registers, more than {PARKED} of them outside of loops"
    assert report.faults == ([fault] if faulty else [])


def test_accesses_to_spilled_registers_are_located() -> None:
    code = """
        /*0000*/                   STL.64 [R1], R48 ;
        /*0010*/               @P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0020*/                   LDL.LU R2, [R1+0x8] ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/              @!P1 BRA `(.L_x_0) ;
.L_x_1:
        /*0050*/                   LDL.LU.64 R48, [R1] ;
        /*0060*/                   EXIT ;
.L_x_2:
        /*0070*/                   BRA `(.L_x_2);
"""
    report = Report("a form", "80")
    read_sass(report, code)
    assert (report.spills, report.spills_in_loops, report.instructions["all"]) == (3, 1, 8)


def test_products_without_tensor_cores_are_found() -> None:
    report = inspect(replace(form("lowrank_gemm fp32 32x32x16 forward"), tensor_cores=True), "90")
    assert "no HGMMA instruction" in report.faults


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "merge", "--targets", "80", "gfx942"]) == 0
    assert "1 forms, 2 compiled for 2 targets, 0 faults" in capsys.readouterr().out
