"""Report the resources of every CUDA kernel, compiled without a GPU: registers, memory and instruction counts.

    python -m tests.csrc.resource_report                              # prints a table of all kernels, and the faults
    python -m tests.csrc.resource_report --targets 90a --only project

A fault is one of the following:

- a compile error (launch.h checks dynamic shared memory at compile time), or output that could not be parsed
- more spilled registers or a larger stack frame than allowed
- more than 48 KiB of static shared memory
- a 16-bit product without tensor-core instructions or without asynchronous copies
- a compiler message that tensor-core instructions were serialized

The report does not check speed or results.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from efft_kernels.build import NVCC_FLAGS, BuildError, Tools, cuda_sources, find_tools

#: The architectures to compile for. The released library contains 80 and 90a, but not 100.
TARGETS = ("80", "90a", "100")
#: For each target, a limit on the bytes of spills, on the bytes of stack, and on the number of accesses to both. For
#: 100, the compiler spills some values so that more blocks fit on a multiprocessor.
_PARKED = {"80": 0, "90a": 0, "100": 64}
#: Maximum bytes of static shared memory per kernel.
_STATIC_SHARED = 48 * 1024
#: A pattern for the names of the kernels that are 16-bit products.
_PRODUCT = re.compile(
    r"(lowrank_gemm|project|reduce_tokens)_kernel<(__half|__nv_bfloat16)|lowrank_gemm_(pingpong_)?sm90"
)
#: The instructions to count: for each column of the table (and "local", for spills), a pattern for their names.
_CLASSES = {
    "HMMA": r"HMMA",
    "HGMMA": r"HGMMA",
    "TMA": r"UTMALDG|UTMASTG|UBLKCP",
    "LDGSTS": r"LDGSTS",
    "LDSM": r"LDSM",
    "STSM": r"STSM",
    "FFMA": r"FFMA",
    "local": r"LDL|STL",
}


@dataclass
class Report:
    """Hold the resources of one kernel on one target.

    Attributes:
        kernel: readable name of the kernel, or the name of the file if it could not be compiled.
        target: the architecture, see ``TARGETS``.
        registers: number of registers per thread, or -1 if it is unknown.
        stack: bytes of stack frame per thread, or -1 if unknown.
        spills: bytes of spill stores and loads per thread, or -1 if unknown.
        shared_memory: bytes of static shared memory per block.
        dynamic_shared: bytes of dynamic shared memory per block; -1 if unknown, because the compiler does not state it.
        instructions: number of instructions of each kind, and of all instructions ("all").
        faults: descriptions of faults; empty if the kernel passes.
    """

    kernel: str
    target: str
    registers: int = -1
    stack: int = -1
    spills: int = -1
    shared_memory: int = 0
    dynamic_shared: int = -1
    instructions: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def inspect(source: Path, flags: Sequence[str], target: str, tools: Tools) -> list[Report]:
    """Compile one file for one target and return the reports of its kernels."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        own = [word for flag in flags if not flag.startswith("-gencode") for word in flag.split(" ", 1)]
        code = f"-gencode=arch=compute_{target},code=sm_{target}"
        command = [str(tools.nvcc), "-std=c++17", *NVCC_FLAGS.split(), *own, code, "-cubin"]
        done = subprocess.run([*command, "-Xptxas=-v", "-o", cubin, source], capture_output=True, text=True)
        if done.returncode != 0:
            error = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-200:])
            return [Report(source.name, target, faults=[f"does not compile: {error}"])]
        code = _run(find_tool("nvdisasm", tools), "-c", str(cubin))
    reports = read(done.stderr, code, target)
    if not reports:
        return [Report(source.name, target, faults=["nothing could be read from the compiled code"])]
    for report in reports:
        report.faults = faults(report, done.stderr)
    return reports


def read(said: str, code: str, target: str) -> list[Report]:
    """Return reports of the kernels in a file from the output of ``ptxas -v`` and the disassembled code."""
    counts: dict[str, collections.Counter[str]] = {}
    for part in re.split(r"^\s*\.section\s+\.text\.", code, flags=re.M)[1:]:
        count = counts.setdefault(part.partition(",")[0], collections.Counter())
        for name in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", part):
            count["all"] += 1
            for kind, pattern in _CLASSES.items():
                count[kind] += re.fullmatch(pattern, name) is not None
    reports = []
    for part in said.split("Compiling entry function '")[1:]:
        name = part.partition("'")[0]
        report = Report(_readable(name), target, instructions=dict(counts.get(name, {})))
        if found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part):
            report.stack, report.spills = int(found[1]), int(found[2]) + int(found[3])
        if found := re.search(r"Used (\d+) registers", part):
            report.registers = int(found[1])
        if found := re.search(r"(\d+) bytes smem", part):
            report.shared_memory = int(found[1])
        reports.append(report)
    return reports


def faults(report: Report, said: str) -> list[str]:
    """Return the faults of one kernel; ``said`` is the compiler's output for the file."""
    found = []
    has = report.instructions
    if report.registers < 0 or report.stack < 0 or not has.get("all"):
        found.append("nothing could be read from the compiled code")
    if max(report.spills, report.stack, has.get("local", 0)) > _PARKED[report.target]:
        found.append(f"{report.spills} bytes spilled, {report.stack} bytes of stack, {has.get('local', 0)} accesses")
    if report.shared_memory > _STATIC_SHARED:
        found.append(f"{report.shared_memory} bytes of static shared memory")
    if _PRODUCT.search(report.kernel):
        needs = ("HGMMA", "TMA") if "sm90" in report.kernel else ("HMMA", "LDGSTS", "LDSM")
        for needed in (*needs, "STSM") if "pingpong" in report.kernel else needs:
            if not has.get(needed):
                found.append(f"no {needed} instruction")
    found += sorted({note.strip() for note in re.findall(r".*(?:C75\d\d|serializ).*", said)})
    return found


def inspect_all(tools: Tools, targets: Iterable[str], only: str = "") -> list[Report]:
    """Inspect all kernels in files whose name contains ``only``, and compile them in parallel.

    ``MAX_JOBS`` compilers run at a time or, if this variable is not set, one per core. Files whose name ends in
    ``_sm90.cu`` are compiled only for the target 90a.
    """
    assert tools.cutlass is not None
    work = [
        (source, flags, target, tools)
        for source, flags in cuda_sources(tools.cutlass)
        for target in targets
        if source.suffix == ".cu" and only in source.name and (target == "90a" or not source.stem.endswith("_sm90"))
    ]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        return [report for reports in pool.map(lambda args: inspect(*args), work) for report in reports]


def table(reports: Iterable[Report]) -> str:
    """Return the reports as a table."""
    kinds = [kind for kind in _CLASSES if kind != "local"]
    head = f"{'kernel':<62} {'target':>6} {'regs':>4} {'spill':>5} {'stack':>5} {'shared':>6}  "
    lines = [head + ", ".join((*kinds, "all"))]
    for r in reports:
        counts = ", ".join(str(r.instructions.get(kind, 0)) for kind in (*kinds, "all"))
        shared = r.dynamic_shared if r.dynamic_shared >= 0 else ""
        lines.append(f"{r.kernel:<62} {r.target:>6} {r.registers:>4} {r.spills:>5} {r.stack:>5} {shared:>6}  {counts}")
        lines += [f"  FAULT: {fault}" for fault in r.faults]
    return "\n".join(lines)


def dynamic_shared(symbols: str) -> dict[str, int]:
    """Return the bytes of dynamic shared memory of each kernel, by its readable name without spaces.

    ``symbols`` is the output of ``nm -C`` for a library that the emulator in tests/csrc/emulation built. There, the
    list of kernels in launch.h has a symbol for each kernel, which contains this number.
    """
    found = {}
    for name, size in re.findall(r"efft::listed<&\(?(.*), (\d+)ul>$", symbols, re.M):
        types = name.replace("efft::bf16", "__nv_bfloat16").replace("efft::fp16", "__half")
        found[_short(types).replace(" ", "")] = int(size)
    return found


def _readable(name: str) -> str:
    """Return the demangled name of a kernel without namespaces and parameters."""
    return _short(_run("c++filt", name).strip())


def _short(name: str) -> str:
    name = re.sub(r"efft::|\(anonymous namespace\)::|^void ", "", name)
    name = re.sub(r"\(Order\)(\d)", lambda order: ("outer", "sum")[int(order[1])], name)
    return re.sub(r"\((?:const )?[A-Z]\w+[,)].*|(?<=>)\(.*", "", name)


def find_tool(name: str, tools: Tools) -> str:
    """Return the path of a tool from the CUDA toolkit or from Triton's wheel."""
    assert tools.nvcc is not None
    spec = importlib.util.find_spec("triton")
    triton = Path(spec.origin).parent / "backends/nvidia/bin" if spec is not None and spec.origin else Path()
    root = re.search(r"^#\$ TOP=(.*)$", _run(tools.nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null", silent=True), re.M)
    places = [*([Path(root[1]) / "bin"] if root else []), triton]
    found = next((str(place / name) for place in places if (place / name).is_file()), None) or shutil.which(name)
    if found is None:
        raise BuildError(f"{name} not found: install the CUDA toolkit or the triton package; both contain it")
    return found


def _run(*command: str, silent: bool = False) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=not silent)
    return done.stdout + done.stderr if silent else done.stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. The exit code is 1 if there is a fault, or if no kernel was compiled."""
    parser = argparse.ArgumentParser(prog="python -m tests.csrc.resource_report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only", default="", help="inspect only files whose name contains this text")
    parser.add_argument("--emulated", help="a library of the emulator, for the column 'shared' (dynamic shared memory)")
    options = parser.parse_args(arguments)
    try:
        tools = find_tools("cuda")
    except BuildError as error:
        parser.error(str(error))
    reports = inspect_all(tools, options.targets, options.only)
    sizes = dynamic_shared(_run("nm", "-C", "--defined-only", options.emulated)) if options.emulated else {}
    for report in reports:
        report.dynamic_shared = sizes.get(report.kernel.replace(" ", ""), -1)
    count = sum(len(r.faults) for r in reports)
    print(table(reports))
    print(f"{len(reports)} kernels compiled for {len(options.targets)} targets, {count} faults")
    return int(count > 0 or not reports)


if __name__ == "__main__":
    sys.exit(main())
