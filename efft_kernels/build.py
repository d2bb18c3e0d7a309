"""Build the compiled extension from ``csrc/``, at installation (setup.py) or by ``python -m efft_kernels build``.

The targets are ``cpu`` and ``cuda``. Each library works with every torch from 2.10 on and with every Python version,
because it does not use Python and uses only the stable ABI of torch. The name of a library contains a hash of the
sources, so that a library built from other sources is never loaded.

This module uses only the standard library and locates torch without importing it, because setup.py runs it before
anything is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

TARGETS = ("cpu", "cuda")

_PACKAGE = Path(__file__).parent
OLDEST_TORCH = "0x020a000000000000"  # 2.10, in the format of TORCH_TARGET_VERSION

_AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512"
#: Flags of each instruction set for which csrc/cpu/kernels.cpp is compiled; dispatch.cpp chooses among the same names.
_ISAS = {
    "x86_64": {
        "amx": f"{_AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
        "avx512bf16": f"{_AVX512} -mavx512bf16",
        "avx512": _AVX512,
        "avx2": "-mavx2 -mfma",
        "portable": "",
    },
    "other": {"portable": ""},
}
#: GPUs for which csrc/cuda is compiled to machine code. The PTX of the first one also runs on newer GPUs.
_GENERATIONS = ("-gencode=arch=compute_80,code=[sm_80,compute_80]", "-gencode=arch=compute_90a,code=sm_90a")
_BYTES_A_JOB = {"cpu": 1 << 30, "cuda": 4 << 30}


class BuildError(RuntimeError):
    """Report that a requested target cannot be built; the message states the reason and what to do."""


@dataclass(frozen=True)
class Tools:
    """Hold the paths of the tools and headers for a build."""

    ninja: str
    cxx: str
    torch: Path  # folder of the installed torch package
    nvcc: str | None = None
    cutlass: Path | None = None  # folder of the CUTLASS headers


def sources() -> Path:
    """Return the folder ``csrc``: next to the package in a checkout, inside the package after installation."""
    inside = _PACKAGE / "csrc"
    return inside if inside.is_dir() else _PACKAGE.parent / "csrc"


def cache() -> Path:
    """Return the folder in which ``python -m efft_kernels build`` and editable installations put libraries."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "efft_kernels"


def library_name(target: str) -> str:
    """Return the file name of a target's library, including a hash of all inputs of its build."""
    digest = hashlib.sha256(f"{target} {platform.machine()}".encode() + Path(__file__).read_bytes())
    for path in _inputs(target):
        digest.update(path.relative_to(sources()).as_posix().encode() + b"\0" + path.read_bytes())
    return f"libefft_{target}-{digest.hexdigest()[:12]}.so"


def find(target: str) -> Path | None:
    """Return the library for the current sources, from the installed package or else from the cache; None if absent."""
    if not sources().is_dir():
        return None
    for folder in (_PACKAGE / "lib", cache()):
        if (folder / library_name(target)).is_file():
            return folder / library_name(target)
    return None


def requested_build(environment: Mapping[str, str]) -> str:
    """Return the value of ``EFFT_BUILD_EXT``: auto, none, cpu or cuda. Raise ValueError for any other value."""
    request = environment.get("EFFT_BUILD_EXT") or "auto"
    if request not in ("auto", "none", *TARGETS):
        raise ValueError(f"EFFT_BUILD_EXT must be auto, none, cpu or cuda, got {request!r}")
    return request


def plan(request: str) -> tuple[list[str], list[str]]:
    """Return the targets to build, and three lines that report the decision for each target and its reason.

    ``cuda`` includes ``cpu``. ``auto`` builds the targets for which this machine has the tools.

    Raises:
        BuildError: a target that is requested by name cannot be built.
    """
    targets: list[str] = []
    lines = []
    for target in TARGETS:
        if request == "none" or (request == "cpu" and target == "cuda"):
            lines.append(f"  {target}: not requested")
            continue
        try:
            tools = find_tools(target)
        except BuildError as missing:
            if request != "auto":
                raise BuildError(f"EFFT_BUILD_EXT={request}: {missing}") from None
            lines.append(f"  {target}: not built: {missing}")
            continue
        targets.append(target)
        lines.append(f"  {target}: {tools.nvcc or tools.cxx}, torch headers in {tools.torch}")
        if target == "cuda":
            lines[-1] += f", CUTLASS's in {tools.cutlass}"
    return targets, [f"efft-kernels: EFFT_BUILD_EXT={request}, building {', '.join(targets) or 'nothing'}", *lines]


def find_tools(target: str) -> Tools:
    """Return the tools that ``target`` needs. Raise BuildError, which names the first missing tool."""
    if sys.platform != "linux":
        raise BuildError(f"the extension can be built only on Linux, and this is {sys.platform}")
    cxx = next(
        (path for name in (os.environ.get("CXX"), "g++", "c++", "clang++") if name and (path := _which(name))), ""
    )
    if not cxx:
        raise BuildError("no C++ compiler: install g++ 12 or newer, or set CXX")
    ninja = _which("ninja")
    if ninja is None:
        raise BuildError("ninja not found: pip install ninja")
    torch = _torch()
    if not (torch / "include/torch/csrc/stable/ops.h").is_file():
        raise BuildError(
            f"torch's headers not found in {torch}: install torch 2.10 or newer into this environment first"
        )
    if target == "cpu":
        return Tools(ninja, cxx, torch)
    nvcc = _which(str(Path(os.environ["CUDA_HOME"]) / "bin/nvcc")) if os.environ.get("CUDA_HOME") else _which("nvcc")
    if nvcc is None:
        raise BuildError("nvcc not found: install the CUDA toolkit, or set CUDA_HOME")
    cutlass = _cutlass()
    if cutlass is None:  # the fast kernel for sm_90 needs these headers, and auto expects that kernel to exist
        raise BuildError("CUTLASS's headers not found: pip install --no-deps nvidia-cutlass")
    return Tools(ninja, cxx, torch, nvcc, cutlass)


def build(targets: list[str], folder: Path, objects: Path | None = None) -> list[Path]:
    """Compile ``targets`` into ``folder`` and return the paths of the libraries.

    If ``objects`` is passed, object files stay in that folder for the next build. A library appears under its final
    name only when it is complete.

    Raises:
        BuildError: the compiler failed; the message contains its output.
    """
    built = []
    for target in targets:
        with tempfile.TemporaryDirectory() as temporary:
            work = objects or Path(temporary)
            work.mkdir(parents=True, exist_ok=True)
            script = work / f"{target}.ninja"
            script.write_text(_ninja(target, find_tools(target)))
            command = [find_tools(target).ninja, "-f", script.name, "-j", str(_jobs(target)), f"{target}.so"]
            done = subprocess.run(command, cwd=work, capture_output=True, text=True)
            if done.returncode != 0:
                raise BuildError(f"building the {target} extension failed:\n{done.stdout}{done.stderr}")
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / library_name(target)
            partial = path.with_suffix(f".{os.getpid()}")
            shutil.copy(work / f"{target}.so", partial)
            partial.replace(path)
            built.append(path)
    return built


def build_into_cache(targets: list[str]) -> list[Path]:
    """Build those ``targets`` whose libraries do not exist yet. In a checkout, unchanged files are not recompiled."""
    objects = _PACKAGE.parent / "build" / "csrc" if sources().parent == _PACKAGE.parent else None
    return build([target for target in targets if find(target) is None], cache(), objects)


def _inputs(target: str) -> list[Path]:
    own = (p for p in (sources() / target).rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})
    return sorted([*own, *sources().glob("*.h")])


def _ninja(target: str, tools: Tools) -> str:
    """Return the ninja build script for one target."""
    stubs = ["libtorch.so", "libtorch_cpu.so", "libc10.so"]
    lines = [
        f"cxx = {_escape(tools.cxx)}",
        # The build links empty substitutes for torch's libraries. The real ones are loaded at run time.
        "rule stub",
        "  command = $cxx -shared -nostdlib -x c /dev/null -Wl,-soname,$out -o $out",
        *(f"build {stub}: stub" for stub in stubs),
        f"torch = -std=c++20 -DTORCH_TARGET_VERSION={OLDEST_TORCH} -isystem {_escape(str(tools.torch / 'include'))}",
    ]
    compiled = _cpu_objects(lines) if target == "cpu" else _cuda_objects(lines, tools)
    lines.append(f"build {target}.so: link {' '.join(compiled)} | {' '.join(stubs)}")
    return "\n".join(lines) + "\n"


def isa_flags() -> dict[str, str]:
    """Return the compiler flags of the cpu library's instruction sets on this type of machine, the best one first."""
    return _ISAS.get(platform.machine(), _ISAS["other"])


def _cpu_objects(lines: list[str]) -> list[str]:
    lines += [
        # CXXFLAGS and LDFLAGS do not affect the library's name, because they need not be set where a wheel is used.
        f"flags = -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-psabi {_escape(os.environ.get('CXXFLAGS', ''))}",
        f"link_flags = {_escape(os.environ.get('LDFLAGS', '-s'))}",
        "rule compile",
        "  command = $cxx $torch $flags $set -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx -shared $link_flags $in -Wl,--no-as-needed -L. -ltorch -ltorch_cpu -lc10 -o $out",
    ]
    objects = []
    for source in _inputs("cpu"):
        if source.suffix == ".cpp" and source.name != "kernels.cpp":
            objects.append(f"cpu-{source.stem}.o")
            lines.append(f"build {objects[-1]}: compile {_escape(str(source))}")
    for isa, flags in isa_flags().items():
        objects.append(f"cpu-{isa}.o")
        lines += [f"build {objects[-1]}: compile {_escape(str(sources() / 'cpu/kernels.cpp'))}"]
        lines += [f"  set = -DEFFT_ISA={isa} {flags}"]
    return objects


def _cuda_objects(lines: list[str], tools: Tools) -> list[str]:
    lines += [
        f"nvcc = {_escape(tools.nvcc or '')} -ccbin $cxx",
        "rule compile",
        f"  command = $nvcc {NVCC_FLAGS} $set -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $nvcc -shared $in -Xlinker -s -Xlinker --no-as-needed -L. -ltorch -ltorch_cpu -lc10 -o $out",
    ]
    objects = []
    assert tools.cutlass is not None
    for source, flags in cuda_sources(tools.cutlass):
        objects.append(f"cuda-{source.name}.o")
        lines.append(f"build {objects[-1]}: compile {_escape(str(source))}")
        lines.append(f"  set = {'$torch' if source.suffix == '.cpp' else ' '.join(('-std=c++17', *flags))}")
    return objects


#: Compiler flags for every file in csrc/cuda.
NVCC_FLAGS = "-O3 -DNDEBUG -Xcompiler=-fPIC,-fvisibility=hidden,-Wall"


def cuda_sources(cutlass: Path) -> list[tuple[Path, list[str]]]:
    """Return the files of csrc/cuda to compile, each with its own flags."""
    found: list[tuple[Path, list[str]]] = []
    for source in _inputs("cuda"):
        if source.suffix in (".cpp", ".cu"):
            flags = [*_GENERATIONS, "-DEFFT_SM90"]
            if source.stem.endswith("_sm90"):
                relaxed = ("--expt-relaxed-constexpr", f"-isystem {_escape(str(cutlass))}")
                flags = [*_GENERATIONS[1:], "-DEFFT_SM90", *relaxed]
            found.append((source, flags))
    return found


def _escape(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _jobs(target: str) -> int:
    """Return ``MAX_JOBS`` if set, else the number of jobs that the cores and the available memory allow."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    return max(1, min(os.cpu_count() or 1, available_memory() // _BYTES_A_JOB[target]))


def available_memory() -> int:
    """Return how many bytes of memory a program can still allocate.

    They include the memory of caches that Linux gives up when programs need it. On other systems, the result is the
    size of the whole memory.
    """
    facts = Path("/proc/meminfo")
    available = re.search(r"^MemAvailable: +(\d+) kB$", facts.read_text(), re.MULTILINE) if facts.exists() else None
    return int(available[1]) << 10 if available else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _torch() -> Path:
    """Return the folder of the torch package for which the extension is built.

    This package is in the environment into which pip installs, even if pip runs the build in an isolated environment.
    """
    installed = Path(sysconfig.get_path("platlib")) / "torch"
    if installed.is_dir():
        return installed
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec is not None and spec.origin else installed


def _cutlass() -> Path | None:
    """Return the headers of CUTLASS from the package nvidia-cutlass, in the environment of torch."""
    spec = importlib.util.find_spec("cutlass_library")
    folders = [Path(sysconfig.get_path("platlib")) / "cutlass_library"]
    folders += [Path(spec.origin).parent] if spec is not None and spec.origin else []
    found = (folder / "source" / "include" for folder in folders)
    return next((path for path in found if (path / "cutlass/cutlass.h").is_file()), None)


def _which(name: str) -> str | None:
    """Find a program on the PATH or in the folder of this Python, where pip installs ninja."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def main(arguments: list[str]) -> int:
    """Run ``python -m efft_kernels build``. If a request cannot be met, print the reason and return exit code 1."""
    parser = argparse.ArgumentParser(
        prog="python -m efft_kernels build", description="Compile the extension, csrc/, into a cache."
    )
    parser.add_argument("--targets", choices=("auto", *TARGETS), help="targets (default: EFFT_BUILD_EXT or auto)")
    named = parser.parse_args(arguments).targets
    try:
        targets, summary = plan(named or requested_build(os.environ))
        print("\n".join(summary))
        for path in build_into_cache(targets):
            print(f"built {path} ({path.stat().st_size / 1024:.0f} KiB)")
    except (BuildError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
