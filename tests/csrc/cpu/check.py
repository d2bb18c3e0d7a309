"""Run the tests of the compiled backend ``cpu`` under sanitizers, or with other instruction sets than the best.

Pytest runs in separate processes and receives the remaining arguments of the command.

``python -m tests.csrc.cpu.check sanitizers`` (``make check-native``) runs static checkers on the sources. It then runs
the backend's tests under GCC's address and undefined-behavior sanitizers, once per instruction set that this processor
supports. The sanitizers stop a test at any access outside a buffer and report the file and line.

``python -m tests.csrc.cpu.check sets`` (``make check-isa``) runs the numerical tests with every instruction set except
the best one, which all other tests use.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from efft_kernels import build, native

ROOT = Path(__file__).parents[3]
SANITIZERS = "-fsanitize=address,undefined"
#: The value of pytest's option -k that selects the tests of the backend cpu. It excludes the other backends, because
#: the ids of their tests may contain "cpu" as well, as the name of the device.
OF_THE_BACKEND = "cpu and not (eager or reference or triton)"


def instruction_sets() -> list[str]:
    """Return the names of the instruction sets that this processor supports, the best one first."""
    names = ["avx512", "avx2", "portable"]
    best = torch.backends.cpu.get_cpu_capability().lower()
    found = next((names[i:] for i, name in enumerate(names) if best.startswith(name)), names[-1:])
    facts = Path("/proc/cpuinfo")
    has = facts.read_text().split() if found[0] == "avx512" and facts.is_file() else []
    more = {"amx": "amx_bf16", "avx512bf16": "avx512_bf16"}
    return [*(name for name, flag in more.items() if flag in has), *found]


def build_sanitized(root: Path, cache: Path) -> None:
    """Build the cpu library of the checkout ``root`` into ``cache``.

    The build disables optimization, which could hide errors.
    """
    flags = {"CXXFLAGS": f"{SANITIZERS} -fno-sanitize-recover=undefined -g -O0", "LDFLAGS": SANITIZERS}
    environment = {**os.environ, **flags, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "efft_kernels", "build", "--targets", "cpu"]
    subprocess.run(command, cwd=root, env=environment, check=True)


def sanitized(root: Path, cache: Path, isa: str) -> dict[str, str]:
    """Return the environment for a program that uses the sanitized library.

    The program needs LD_PRELOAD, because the libraries of the sanitizers must be loaded before all others.
    """
    cxx = build.find_tools("cpu").cxx
    libraries = [
        subprocess.run([cxx, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")
    ]
    return {
        **os.environ,
        "XDG_CACHE_HOME": str(cache),
        "PYTHONPATH": f"{root}:{root / 'python'}",
        "EFFT_CPU_ISA": isa,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:protect_shadow_gap=0",  # Python does not free its memory before it exits
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def read_sources() -> list[list[str]]:
    """Return the commands that check csrc/cpu statically: clang-tidy, and cppcheck if it is installed."""
    include = build.find_tools("cpu").torch / "include"
    files = [str(path) for path in sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
    flags = ["-std=c++20", f"-DTORCH_TARGET_VERSION={build.OLDEST_TORCH}", "-isystem", str(include)]
    commands = [["clang-tidy", "--quiet", *files, "--", *flags, "-DEFFT_ISA=portable"]]
    # The kernels are also checked for the instruction set with the most code, even if this processor lacks it.
    best, of_best = next(iter(build.isa_flags().items()))
    kernels = str(ROOT / "csrc/cpu/kernels.cpp")
    commands.append(["clang-tidy", "--quiet", kernels, "--", *flags, f"-DEFFT_ISA={best}", *of_best.split()])
    if shutil.which("cppcheck") is None:
        print("cppcheck is skipped, because it is not installed: apt-get install cppcheck", flush=True)
        return commands
    options = ["--std=c++20", "--enable=warning,performance,portability", "--suppress=passedByValue", "--quiet"]
    registration = (
        "STABLE_TORCH_LIBRARY_IMPL(a,b,c)=void implement(Library& c)"  # cppcheck does not see torch's headers
    )
    return [*commands, ["cppcheck", *options, "--error-exitcode=1", "-DEFFT_ISA=portable", f"-D{registration}", *files]]


def check_sets(arguments: list[str]) -> None:
    """Run the numerical tests, including those of random shapes, with every instruction set except the best."""
    if native.MISSING["cpu"] is not None:
        print(f"the tests of the cpu backend are skipped: {native.MISSING['cpu']}", flush=True)
        return
    tests = [
        *("tests/csrc/cpu/test_instruction_sets.py", "tests/csrc/cpu/test_cpu_numbers.py"),
        "tests/efft_kernels/ops",
    ]
    which = f"lesser_sets or ((any or numbers) and {OF_THE_BACKEND})"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-k", which, *tests, *arguments]
    for isa in instruction_sets()[1:]:
        print(f"the tests of the cpu backend with {isa}", flush=True)
        subprocess.run(command, cwd=ROOT, env={**os.environ, "EFFT_CPU_ISA": isa}, check=True)


def check_sanitized(arguments: list[str]) -> None:
    """Check the sources statically, then run the backend's tests under the sanitizers."""
    for command in read_sources():
        print(command[0], flush=True)
        subprocess.run(command, check=True)
    cache = ROOT / "build" / "sanitized"
    build_sanitized(ROOT, cache)
    tests = ["tests/efft_kernels/ops", *(str(path) for path in sorted((ROOT / "tests/csrc/cpu").glob("test_cpu_*.py")))]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-k", OF_THE_BACKEND, *tests, *arguments]
    for isa in instruction_sets():
        print(f"the tests of the cpu backend under {SANITIZERS}, {isa}", flush=True)
        subprocess.run(command, cwd=ROOT, env=sanitized(ROOT, cache, isa), check=True)


if __name__ == "__main__":
    try:
        {"sanitizers": check_sanitized, "sets": check_sets}[sys.argv[1]](sys.argv[2:])
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
