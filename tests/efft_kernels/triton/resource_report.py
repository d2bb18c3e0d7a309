"""Report the resources of every Triton kernel on every target: registers, spills, shared memory, instructions.

    python -m tests.efft_kernels.triton.resource_report  # all forms and targets
    python -m tests.efft_kernels.triton.resource_report --targets 90 --only lowrank_gemm

The kernels are compiled without a GPU. A form is a kernel with one entry of the tile tables, for one use (forward,
backward, backward through a GELU, one adapter per sample), with pointers or TMA, and with the strides and alignments of
a real layer. A form is compiled only for targets on which :mod:`efft_kernels.triton.launch` would choose it. A fault is
one of the following:

- a compile error, or compiled code that could not be parsed
- spilled registers that a loop accesses, or more than ``PARKED`` accesses to spilled registers outside of loops
- more shared memory than the target has
- a half-precision or TF32 product without tensor-core instructions
- a form with tensor cores that never loads 16 bytes at a time or, with TMA, has no bulk tensor copy

The report does not check speed or results.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from efft_kernels.triton import lowrank_gemm, reduce_tokens, tt_contract, tt_merge
from efft_kernels.triton.launch import (
    FP32_TILES,
    HALF_TILES,
    TAIL_R,
    TF32_TILES,
    TMA_TILES,
    GemmTile,
)

#: Bytes of shared memory per program, by target: compute capability times ten, or an AMD architecture.
SHARED_MEMORY = {"80": 166912, "89": 101376, "90": 232448, "100": 232448, "gfx942": 65536}
#: Allowed number of accesses to spilled registers outside of loops. The assembler may store a few values in memory
#: before a loop and read them after it, so that more programs fit on a multiprocessor. This takes no noticeable time.
PARKED = 8
#: The instructions that may jump to a label of the same function.
_JUMPS = ("BRA", "CALL", "JMP")
#: The uses of a product whose epilogue applies the slope of a GELU, and the kind of GELU.
SLOPES = {"backward gelu": "gelu", "backward gelu_tanh": "gelu_tanh"}
#: The integer arguments that are not multiples of 16 in real layers.
_UNALIGNED = ("columns_out", "columns", "blocks", "samples", "splits")
_TENSOR_CORE = {"80": "HMMA", "89": "HMMA", "90": "HGMMA", "100": "UTC*MMA", "gfx942": "MFMA"}
_CLASSES = {
    "HMMA": r"HMMA",
    "HGMMA": r"HGMMA",
    "UTC*MMA": r"UTC\w*MMA",
    "FFMA": r"FFMA\w*",
    "LDG": r"LDG|LDGSTS",
    "TMA": r"UTMALDG",
}


@dataclass(frozen=True)
class Form:
    """Hold a kernel and the arguments of its launch.

    Attributes:
        name: name in the report.
        kernel: the jitted function.
        types: Triton types of its arguments, without constants. For an argument that is a tuple, the value contains the
            type of each element by name.
        constants: compile-time arguments, and arguments that Triton specializes (strides of 1, absent tensors). The
            value of a tuple contains its constant elements by name.
        warps, stages: launch options.
        estimate: shared memory in bytes that the choice of a tile assumes, or None if there is no choice.
        tensor_cores: whether its products must use tensor cores.
        capability: lowest compute capability on which the form is chosen.
        wide_loads: whether load instructions of 16 bytes are required. If False, the form must use TMA instead.
        elements: the names of the elements of all tuples, in order.
    """

    name: str
    kernel: Any
    types: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    stages: int
    estimate: int | None = None
    tensor_cores: bool = False
    capability: int = 8
    wide_loads: bool = True
    elements: tuple[str, ...] = ()


@dataclass
class Report:
    """Hold the resources of one form on one target.

    ``spills`` is the number of accesses to spilled registers, and ``spills_in_loops`` is the number of those in loops.
    Code that a later instruction jumps back over counts as a loop, so the latter number may be too high. On AMD, where
    the accesses are not read, both are the number of spilled registers. ``faults`` is empty if the form passes.
    ``skipped`` is the reason why the form was not compiled, or None.
    """

    form: str
    target: str
    registers: int = 0
    spills: int = 0
    spills_in_loops: int = 0
    shared_memory: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    skipped: str | None = None


def forms() -> list[Form]:
    """Return a form for every kernel and every entry of the tables."""
    return [*_gemm_forms(), *_other_forms()]


def _gemm_forms() -> Iterable[Form]:
    tables = [
        ("bf16", TMA_TILES, "ieee", True),
        ("bf16", HALF_TILES, "ieee", False),
        ("fp32", FP32_TILES, "ieee", False),
        ("fp32", TF32_TILES, "tf32", False),
    ]
    for dtype, tiles, precision, tma in tables:
        for tile in tiles:
            for use in ("forward", "backward", *SLOPES, "grouped")[: 4 if tma else 5]:
                if use in SLOPES and SLOPES[use] not in tile.slopes:
                    continue  # the launch code never chooses this combination
                yield _gemm_form(dtype, precision, tile, use, tma)


def _gemm_form(dtype: str, precision: str, tile: GemmTile, use: str, tma: bool) -> Form:
    kernel = lowrank_gemm.lowrank_gemm_tma_kernel if tma else lowrank_gemm.lowrank_gemm_kernel
    forward = use in ("forward", "grouped")
    # In the forward pass B is a transposed weight; in the backward pass T is a transposed factor.
    ones = ("ak", "bk", "bias", "tn") if forward else ("ak", "bn", "tr")
    constants: dict[str, Any] = {
        **{f"stride_{name}": 1 for name in ones},
        **({} if forward else {"bias": None, "stride_bias": 0}),
        **({"stride_zn": 1} if use in SLOPES else {"Z": None, "stride_zm": 0, "stride_zn": 0}),
        **({} if use == "grouped" else dict.fromkeys(("stride_as", "stride_ts"), 0)),
        **({} if use == "grouped" else {"adapter": None, "n_adapters": 1, "samples": 1}),
        **{"PRODUCER": SLOPES.get(use, "none"), "TRANSPOSED": forward, "PRECISION": precision},
        **{"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP_M": lowrank_gemm.GROUP_M},
        "BLOCK_R": TAIL_R,
    }
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= {**dict.fromkeys(("A", "B", "bias", "H", "Z", "Y"), f"*{dtype}"), "T": "*fp32"}
    types |= {"adapter": "*i64"}
    if tma:
        blocks = {"A": (tile.m, tile.k), "Y": (tile.m, tile.n // 2)}
        blocks["B"] = (tile.n, tile.k) if forward else (tile.k, tile.n)
        types |= {name: f"tensordesc<{dtype}[{rows}, {columns}]>" for name, (rows, columns) in blocks.items()}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return Form(
        f"lowrank_gemm{'_tma' if tma else ''} {dtype}{' tf32' if precision == 'tf32' else ''} "
        f"{tile.m}x{tile.n}x{tile.k} {use}",
        kernel,
        {name: types[name] for name in kernel.arg_names if name not in constants},
        constants,
        tile.warps,
        tile.stages,
        tile.shared_memory(2 if dtype == "bf16" else 4, tma=tma),
        precision == "tf32" or dtype == "bf16",
        tile.capability,
        wide_loads=not tma,
    )


def _other_forms() -> Iterable[Form]:
    for rank in (16, 32, 64):
        for producer in ("none", "gelu", "gelu_tanh", "norm"):
            name = f"bf16 r{rank}{'' if producer == 'none' else ' ' + producer}"
            absent = {n: None for n in ("gamma", "beta", "mean", "rstd") if producer != "norm"}
            types = {
                **{"gamma": "*fp32", "beta": "*fp32", "mean": "*fp32", "rstd": "*fp32", "eps": "fp32"},
                **dict.fromkeys(("A", "H", "out", "gy", "h", "x", "dh"), "*bf16"),
                **dict.fromkeys(("P", "partial"), "*fp32"),
            }
            constants = {
                **{"stride_ak": 1, "stride_pr": 1, "stride_as": 0, "stride_ps": 0, "adapter": None, "n_adapters": 1},
                **{"stride_gn": 1, "stride_xn": 1, "PRODUCER": producer, "PRECISION": "ieee", "BLOCK_R": rank},
                **absent,
            }
            block_k, warps = lowrank_gemm.columns_and_warps(producer)
            blocks: dict[str, Any] = {"BLOCK_M": lowrank_gemm.PROJECT_M, "BLOCK_K": block_k}
            if producer == "none":
                blocks["out"] = None
            yield _plain_form(
                f"project {name}",
                lowrank_gemm.project_kernel,
                types,
                {**constants, **blocks},
                (warps, lowrank_gemm.PROJECT_STAGES),
            )
            block_n, warps = reduce_tokens.columns_and_warps(producer)
            for need_db in (True, False):
                yield _plain_form(
                    f"reduce_tokens {name}{'' if need_db else ' without db'}",
                    reduce_tokens.reduce_tokens_kernel,
                    types,
                    {**constants, "NEED_DB": need_db, "BLOCK_M": reduce_tokens.BLOCK_M, "BLOCK_N": block_n},
                    (warps, reduce_tokens.STAGES),
                )
        yield from _forms_of_two_layers(rank)
    pointers, numbers = ("partial", "dG", "dD", "db"), ("n_G", "n_D", "n_b")
    sums = {**dict.fromkeys(pointers, "*fp32"), **dict.fromkeys(numbers, "i32")}
    options = {"BLOCK": reduce_tokens.FINISH_BLOCK}, reduce_tokens.FINISH_WARPS, 3
    yield Form("finish", reduce_tokens.finish_kernel, {**sums, "splits": "i32"}, *options)
    types = {"first": sums, "second": sums, "blocks": "i32", "splits": "i32"}
    yield Form("finish two", reduce_tokens.finish_two_kernel, types, *options, elements=(*pointers, *numbers))
    blocks = {"BLOCK_R": tt_contract.BLOCK_R, "BLOCK_N": tt_contract.BLOCK_N}
    for kernel in (tt_contract.contract_kernel, tt_contract.contract_backward_kernel):
        for masks in (False, True):
            names = [name for name in kernel.arg_names if name not in blocks]
            pointers = ("C", "V", "G", "dG", "dC", "dV")
            types = {n: "*fp32" if n in pointers else "fp32" if n == "scale" else "i32" for n in names}
            absent = {} if masks else {"keep_C": None, "keep_V": None}
            types |= {"keep_C": "*u8", "keep_V": "*u8"}
            ones = {n: 1 for n in ("stride_cj", "stride_vn", "stride_gn") if n in names}
            ones |= dict.fromkeys(("stride_kj", "stride_mn"), int(masks))
            constants = {**blocks, **absent, **ones}
            yield Form(
                f"{kernel.__name__.removesuffix('_kernel')}{' dropout' if masks else ''}",
                kernel,
                {n: kind for n, kind in types.items() if n not in constants},
                constants,
                tt_contract.WARPS,
                tt_contract.STAGES,
            )
    yield Form(
        "merge bf16",
        tt_merge.merge_kernel,
        {
            **{"W": "*bf16", "D": "*fp32", "G": "*fp32", "sign": "fp32"},
            **dict.fromkeys(("d_out", "d_in", "R", "stride_wo", "stride_di", "stride_gr"), "i32"),
        },
        {
            **{"stride_wi": 1, "stride_dr": 1, "stride_go": 1},
            **{"BLOCK": tt_merge.BLOCK, "BLOCK_R": tt_merge.BLOCK_R},
        },
        tt_merge.WARPS,
        3,
    )


def _forms_of_two_layers(rank: int) -> Iterable[Form]:
    """Yield the sums of the layers of an MLP: the first has a norm or no producer, the second has a GELU."""
    elements = tuple(reduce_tokens._reduce_layer.arg_names)
    elements = elements[: elements.index("column")]
    tensors = {**dict.fromkeys(("gy", "h", "x", "dh"), "*bf16"), "partial": "*fp32"}
    affine = dict.fromkeys(("gamma", "beta", "mean", "rstd"), "*fp32")
    ones = {"stride_gn": 1, "stride_xn": 1}
    for first in ("none", "norm"):
        for second in ("gelu", "gelu_tanh"):
            producers = {"first": first, "second": second}
            constants = {
                **{at: {**ones, **({} if of == "norm" else dict.fromkeys(affine))} for at, of in producers.items()},
                **{f"{at.upper()}_PRODUCER": of for at, of in producers.items()},
                **{"FIRST_NEEDS_DB": first == "norm", "SECOND_NEEDS_DB": second == "gelu"},
                **{"PRECISION": "ieee", "BLOCK_M": reduce_tokens.BLOCK_M, "BLOCK_R": rank},
            }
            constants["BLOCK_N"], warps = reduce_tokens.columns_and_warps(second)
            types: dict[str, Any] = {
                at: {n: {**tensors, **affine}.get(n, "i32") for n in elements if n not in constants[at]}
                for at in producers
            }
            yield Form(
                f"reduce_two bf16 r{rank} {first} {second}",
                reduce_tokens.reduce_two_kernel,
                {**types, "columns": "i32", "TOKENS": "i32"},
                constants,
                *(warps, reduce_tokens.STAGES),
                tensor_cores=True,
                capability=9,
                elements=elements,
            )


def _plain_form(
    name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], warps_stages: tuple[int, int]
) -> Form:
    """Return a form whose remaining arguments are 32-bit integers."""
    constants = {n: value for n, value in constants.items() if n in kernel.arg_names}
    types = {n: types.get(n, "i32") for n in kernel.arg_names if n not in constants}
    return Form(name, kernel, types, constants, *warps_stages, tensor_cores=True)


def inspect(form: Form, target: str) -> Report:
    """Compile ``form`` for ``target`` and return its report."""
    report = Report(form.name, target)
    if form.estimate is not None and form.estimate > SHARED_MEMORY[target]:
        report.skipped = (
            f"never chosen: needs {form.estimate} bytes of shared memory, but the target has {SHARED_MEMORY[target]}"
        )
        return report
    if form.capability > _capability(target):
        report.skipped = f"never chosen: needs compute capability {form.capability}.0 or newer"
        return report
    try:
        compiled = _compile(form, target)
        report.shared_memory = compiled.metadata.shared
        if target.startswith("gfx"):
            _read_amd(report, compiled.asm["amdgcn"])
        else:
            _read_cubin(report, compiled.asm["cubin"])
    except Exception as error:  # any compiler error is a fault of this form; continue with the others
        report.faults.append(f"does not compile: {type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}")
        return report
    judge(report, form)
    return report


def _capability(target: str) -> int:
    return 8 if target.startswith("gfx") else int(target) // 10


def _compile(form: Form, target: str) -> Any:
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    aligned: list[tuple[int, ...]] = []
    for i, name in enumerate(form.kernel.arg_names):
        if isinstance(form.types.get(name), dict):  # a tuple
            paths: dict[str, tuple[int, ...]] = {element: (i, j) for j, element in enumerate(form.elements)}
            types, values = form.types[name], form.constants.get(name, {})
            signature[name] = tuple(types.get(element, "constexpr") for element in paths)
        else:
            paths, types, values = {name: (i,)}, form.types, form.constants
            signature[name] = types.get(name, "constexpr")
        constants |= {path: values[n] for n, path in paths.items() if n not in types}
        kinds = {n: types[n] for n in paths if n in types}
        aligned += [paths[n] for n, kind in kinds.items() if kind[0] == "*" or (kind == "i32" and n not in _UNALIGNED)]
    # Sizes, strides and addresses in real layers are multiples of 16, which wide loads need.
    attributes = {path: [["tt.divisibility", 16]] for path in aligned}
    source = ASTSource(fn=form.kernel, signature=signature, constexprs=constants, attrs=attributes)
    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target), 32)
    return triton.compile(source, target=gpu, options={"num_warps": form.warps, "num_stages": form.stages})


def _read_cubin(report: Report, cubin: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    report.registers = int(registers[1]) if registers else -1
    read_sass(report, code)


def read_sass(report: Report, code: str) -> None:
    """Store the counts of the instructions in ``code``, which ``nvdisasm -c`` printed, in ``report``."""
    counts: collections.Counter[str] = collections.Counter()
    labels: dict[str, int] = {}  # by name, the number of instructions before the label
    loops: list[range] = []
    spills: list[int] = []
    for line in code.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = counts["all"]
        instruction = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)", line)
        if instruction is None:
            continue
        name, modifiers = instruction.groups()
        if name in ("LDL", "STL"):
            spills.append(counts["all"])
        if name in _JUMPS and (target := re.search(r"\((\.L\w+)\)", line)) and target[1] in labels:  # a jump backwards
            loops.append(range(labels[target[1]], counts["all"]))
        counts["all"] += 1
        for kind, pattern in _CLASSES.items():
            counts[kind] += re.fullmatch(pattern, name) is not None
        counts["LDG 16 bytes"] += name in ("LDG", "LDGSTS") and ".128" in modifiers
    report.spills = len(spills)
    report.spills_in_loops = sum(any(at in loop for loop in loops) for at in spills)
    report.instructions = dict(counts)


def _read_amd(report: Report, code: str) -> None:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", code)
        return int(found[1]) if found else -1

    report.registers = number("vgpr_count")
    report.spills = report.spills_in_loops = number("vgpr_spill_count")
    words = re.findall(r"^\s+([a-z]\w+)", code, re.M)
    report.instructions = {
        "all": len(words),
        "MFMA": sum(word.startswith("v_mfma") for word in words),
        "LDG 16 bytes": sum(word.endswith("load_dwordx4") or word.endswith("load_b128") for word in words),
    }


def judge(report: Report, form: Form) -> None:
    """Store the faults of a form in its report."""
    found = report.instructions
    limit = SHARED_MEMORY[report.target]
    if not found.get("all") or report.registers < 0:
        report.faults.append("nothing could be read from the compiled code")
    if report.spills_in_loops:
        what = "spilled registers" if report.target.startswith("gfx") else "accesses to spilled registers in loops"
        report.faults.append(f"{report.spills_in_loops} {what}")
    if report.spills - report.spills_in_loops > PARKED:
        report.faults.append(
            f"{report.spills} accesses to spilled registers, more than {PARKED} of them outside of loops"
        )
    if report.shared_memory > limit:
        report.faults.append(f"{report.shared_memory} bytes of shared memory, but the target has {limit}")
    if form.tensor_cores and not found.get(_TENSOR_CORE[report.target]):
        report.faults.append(f"no {_TENSOR_CORE[report.target]} instruction")
    if not form.wide_loads and not found.get("TMA"):
        report.faults.append("no bulk tensor copy")
    if form.tensor_cores and form.wide_loads and not found.get("LDG 16 bytes"):
        report.faults.append("no load of 16 bytes")


def _run(tool: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def _inspect_named(name: str, target: str) -> Report:
    return inspect(next(form for form in forms() if form.name == name), target)


def inspect_all(wanted: Iterable[Form], targets: Sequence[str], processes: int | None = None) -> list[Report]:
    """Return the reports of all forms on all targets, computed in parallel."""
    pairs = [(form.name, target) for form in wanted for target in targets]
    with ProcessPoolExecutor(processes or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(_inspect_named, *zip(*pairs, strict=True)))


def table(reports: Iterable[Report]) -> str:
    """Return the reports as a table."""
    lines = [f"{'form':<52} {'target':>7} {'regs':>5} {'spills':>6} {'shared':>7}  tensor-core, 16-byte loads, all"]
    for r in reports:
        if r.skipped:
            lines.append(f"{r.form:<52} {r.target:>7} {r.skipped}")
            continue
        counts = [r.instructions.get(key, 0) for key in (_TENSOR_CORE[r.target], "LDG 16 bytes", "all")]
        lines.append(
            f"{r.form:<52} {r.target:>7} {r.registers:>5} {r.spills:>6} {r.shared_memory:>7}  "
            + ", ".join(map(str, counts))
        )
        lines += [f"  FAULT: {fault}" for fault in r.faults]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code: 1 if there is a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.efft_kernels.triton.resource_report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--targets", nargs="+", choices=SHARED_MEMORY, default=list(SHARED_MEMORY))
    parser.add_argument("--only", default="", help="only forms whose name contains this text")
    parser.add_argument("--json", type=Path, help="also write the reports to this file")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET=1 interprets kernels and cannot compile them: unset it")
    wanted = [form for form in forms() if options.only in form.name]
    reports = inspect_all(wanted, options.targets)
    print(f"triton {triton.__version__}\n{table(reports)}")
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in reports], indent=1) + "\n")
    faults = sum(len(r.faults) for r in reports)
    compiled = sum(r.skipped is None for r in reports)
    print(f"{len(wanted)} forms, {compiled} compiled for {len(options.targets)} targets, {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
