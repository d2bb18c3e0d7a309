"""Compiles csrc/cuda for the CPU, against the emulated instructions and runtime beside this file."""

import re
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from efft_kernels.build import find_tools

HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / "csrc" / "cuda"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


def sources() -> dict[str, str]:
    """The files of csrc/cuda that the CPU can run: all but the kernel of sm_90's own instructions."""
    return {p.name: p.read_text() for p in sorted(SOURCES.iterdir()) if not p.name.endswith("_sm90.cu")}


def planted(file: str, what: str, fault: str) -> dict[str, str]:
    """The same with a fault: ``what`` must occur in ``file``, and becomes ``fault`` wherever it does."""
    found = sources()
    assert what in found[file], f"{file} has changed: {what!r} is no longer in it"
    return {**found, file: found[file].replace(what, fault)}


def build(files: Mapping[str, str], folder: Path, sanitize: bool = False) -> Path:
    """A library whose ``efft::<op>.cuda`` run on CPU tensors; what ``folder`` holds unchanged is not compiled again."""
    tools = find_tools("cpu")
    flags = ["-g", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", f"-I{HERE}", *SANITIZERS * sanitize]
    torch = ["-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-isystem{tools.torch / 'include'}"]
    kernel = ["-std=c++17", "-Wno-unknown-pragmas", "-include", str(HERE / "instructions.h"), "-x", "c++"]
    folder.mkdir(parents=True, exist_ok=True)
    changed = set()
    for name, text in {**files, "emulation.cpp": (HERE / "emulation.cpp").read_text()}.items():
        path = folder / name
        # Kernels here are those of the CPU's dispatch key: torch's own name for a GPU tensor is not to be had.
        text = re.sub(r"STABLE_TORCH_LIBRARY_IMPL\(efft, CUDA,", "STABLE_TORCH_LIBRARY_IMPL(efft, CPU,", text)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            changed.add(name)

    def compile_one(source: Path) -> Path:
        target = source.with_name(source.name + ".o")
        kinds = {".h", ".cuh"} if source.suffix == ".cu" else {".h"}
        headers = any(Path(name).suffix in kinds for name in changed)
        if source.name in changed or headers or not target.exists():
            own = kernel if source.suffix == ".cu" else torch
            _run(tools.cxx, *flags, *own, "-c", str(source), "-o", str(target))
        return target

    units = [folder / name for name in (*files, "emulation.cpp") if Path(name).suffix in {".cpp", ".cu"}]
    with ThreadPoolExecutor(2) as pool:
        objects = [str(path) for path in pool.map(compile_one, units)]
    library = folder / "emulated.so"
    libraries = ["-Wl,--no-as-needed", f"-L{tools.torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    _run(tools.cxx, "-shared", *SANITIZERS * sanitize, *objects, *libraries, "-o", str(library))
    return library


def preload(cxx: str) -> str:
    """What LD_PRELOAD must say for a sanitized library in a Python that is not."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    return " ".join(_run(cxx, f"-print-file-name={name}").strip() for name in names)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    if done.stderr:
        print(done.stderr, file=sys.stderr)
    return done.stdout


if __name__ == "__main__":
    print(build(sources(), Path(sys.argv[1])))
