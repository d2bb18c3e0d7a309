"""Compile csrc/cuda for the CPU, with the emulated instructions and CUDA runtime in this folder.

``python -m tests.csrc.emulation.build FOLDER`` builds the library in FOLDER and prints its path. "Hopper" and "sm_90"
are names for GPUs of compute capability 9.0.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from efft_kernels.build import BuildError, find_tools

HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / "csrc" / "cuda"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


class Hopper(NamedTuple):
    """Hold the folders of headers that the kernels for compute capability 9.0 need.

    Attributes:
        toolkit: headers of the CUDA toolkit.
        cutlass: headers of CUTLASS.
    """

    toolkit: Path
    cutlass: Path


def hopper() -> Hopper:
    """Find the headers of the CUDA toolkit and of CUTLASS.

    Raises:
        BuildError: if one of them is missing. The emulator can then still run all other kernels.
    """
    tools = find_tools("cuda")
    said = subprocess.run([str(tools.nvcc), "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    found = re.search(r'INCLUDES="-I([^"]+)"', said)
    if found is None:
        raise BuildError(
            f"the headers of the CUDA toolkit were not found: {str(tools.nvcc)!r} --dryrun names no folder of headers"
        )
    return Hopper(Path(found[1].strip()), tools.cutlass)


def runs_hopper() -> bool:
    """Return whether the emulator can run the kernels for compute capability 9.0. If not, print why to stderr."""
    try:
        hopper()
    except BuildError as missing:
        print(f"the emulator omits the kernels for compute capability 9.0: {missing}", file=sys.stderr)
        return False
    return True


def sources(with_hopper: bool) -> dict[str, str]:
    """Return the text of each file in csrc/cuda by its name. Unless ``with_hopper``, omit the kernels for sm_90."""
    return {p.name: p.read_text() for p in sorted(SOURCES.iterdir()) if with_hopper or not is_hopper(p.name)}


def is_hopper(name: str) -> bool:
    return name.endswith("_sm90.cu")


def planted(files: Mapping[str, str], file: str, what: str, fault: str) -> dict[str, str]:
    """Return a copy of ``files`` with a fault: in ``file``, every occurrence of ``what`` is replaced by ``fault``.

    ``what`` must occur in the file.
    """
    assert what in files[file], f"{file} has changed: {what!r} is no longer in it"
    return {**files, file: files[file].replace(what, fault)}


def build(files: Mapping[str, str], folder: Path, sanitize: bool = False) -> Path:
    """Build a library whose operators ``efft::<op>.cuda`` run on CPU tensors, and return its path.

    Args:
        files: the text of each source file by its name, see :func:`sources`.
        folder: the folder for sources, objects and the library. A file is not compiled again if an earlier build in
            this folder compiled it with the same command, text and headers.
        sanitize: whether to use the address and undefined-behavior sanitizers instead of the checks of accesses.cpp.
    """
    tools = find_tools("cpu")
    with_hopper = any(map(is_hopper, files))
    flags = ["-g", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", f"-I{HERE}", *SANITIZERS * sanitize]
    torch = ["-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-isystem{tools.torch / 'include'}"]
    kernel = ["-std=c++17", "-Wno-unknown-pragmas", "-Wno-psabi", "-include", str(HERE / "instructions.h"), "-x", "c++"]
    kernel += ["-DEFFT_SM90"] * with_hopper
    of_hopper = _hopper_flags(hopper()) if with_hopper else []
    if not sanitize:  # inserts a call before every memory access; accesses.cpp defines the called functions
        kernel += ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"]
    own = {p.name: p.read_text() for p in sorted(HERE.glob("*.cpp"))}
    folder.mkdir(parents=True, exist_ok=True)
    texts = {}
    for name, text in {**files, **own}.items():
        path = folder / name
        # The operators are registered for CPU tensors, because there are no GPU tensors on a machine without a GPU.
        text = text.replace('#include "../', f'#include "{SOURCES.parent}/')
        text = re.sub(r"STABLE_TORCH_LIBRARY_IMPL\(efft, CUDA,", "STABLE_TORCH_LIBRARY_IMPL(efft, CPU,", text)
        path.write_text(text)
        texts[name] = text
    headers = [path.read_text() for path in sorted([*HERE.rglob("*.h*"), *SOURCES.parent.glob("*.h")])]

    def compile_one(source: Path) -> Path:
        target, record = source.with_name(source.name + ".o"), source.with_name(source.name + ".made_of")
        extra = kernel if source.suffix == ".cu" else ["-O3", "-std=c++17"] if source.name in own else torch
        if is_hopper(source.name):
            # Debug information is omitted, because writing CuTe's long type names takes too long.
            extra = [*kernel, *of_hopper, "-g0"]
        command = [tools.cxx, *flags, *extra, "-c", str(source), "-o", str(target)]
        read = [texts[name] for name in (source.name, *sorted(_included(source.name, files)))]
        made_of = hashlib.sha256("\0".join([*command, *read, *headers]).encode()).hexdigest()
        if not record.exists() or record.read_text() != made_of:
            record.unlink(missing_ok=True)
            _run(*command)
            record.write_text(made_of)
        return target

    units = [folder / name for name in (*files, *own) if Path(name).suffix in {".cpp", ".cu"}]
    units.sort(key=lambda path: not is_hopper(path.name))  # starts with the files that take longest
    with ThreadPoolExecutor(2) as pool:
        objects = [str(path) for path in pool.map(compile_one, units)]
    library = folder / "emulated.so"
    libraries = ["-Wl,--no-as-needed", f"-L{tools.torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    _run(tools.cxx, "-shared", *SANITIZERS * sanitize, *objects, *libraries, "-o", str(library))
    return library


def _included(name: str, files: Mapping[str, str]) -> set[str]:
    """Return the names of the files in csrc/cuda that a file includes, directly or through other files."""
    found: set[str] = set()
    names = [name]
    while names:
        text = files.get(names.pop(), "")
        new = {match for match in re.findall(r'^#include "([^"]+)"', text, re.M) if match in files} - found
        found |= new
        names += new
    return found


def _hopper_flags(headers: Hopper) -> list[str]:
    """Return the flags to compile CuTe without nvcc.

    The emulator's folder precedes CUTLASS's folder in the search path, so that the emulator's files replace CUTLASS's
    files of the same names.
    """
    shared_address = "__cvta_generic_to_shared=emulation::shared_address"
    return [
        *("-DNDEBUG", "-DEFFT_TOOLKIT", "-D__CUDACC_VER_MAJOR__=13", "-D__CUDACC_VER_MINOR__=0"),
        *(
            "-DCUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL",
            "-DCUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED=1",
            f"-D{shared_address}",
        ),
        *("-include", str(HERE / "hopper.h"), "-isystem", str(HERE / "cutlass"), "-isystem", str(headers.cutlass)),
        *("-isystem", str(headers.toolkit), "-isystem", str(headers.toolkit / "cccl")),
    ]


def preload(cxx: str) -> str:
    """Return the value of LD_PRELOAD with which a Python that is not sanitized can load a sanitized library."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    return " ".join(_run(cxx, f"-print-file-name={name}").strip() for name in names)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    if done.stderr:
        print(done.stderr, file=sys.stderr)
    return done.stdout


if __name__ == "__main__":
    print(build(sources(runs_hopper()), Path(sys.argv[1])))
