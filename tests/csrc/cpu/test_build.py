"""Test how the compiled extension is built, how failures are reported, and what the built library depends on.

A user requests the extension with the environment variable EFFT_BUILD_EXT.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from efft_kernels import build, native

ROOT = Path(__file__).parents[3]
CPU = "libefft_cpu-"


def missing_tools(target: str) -> str | None:
    try:
        build.find_tools(target)
    except build.BuildError as error:
        return str(error)
    return None


needs_compiler = pytest.mark.skipif(missing_tools("cpu") is not None, reason=missing_tools("cpu") or "")


@needs_compiler
def test_where_there_is_a_compiler_the_extension_is_tested() -> None:
    """If the library were missing although there is a compiler, all tests of the cpu backend would be skipped."""
    assert native.MISSING["cpu"] is None


def test_nothing_is_built_without_a_wish_or_the_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.requested_build({}) == build.requested_build({"EFFT_BUILD_EXT": ""}) == "auto"
    targets, summary = build.plan("none")
    assert targets == []
    assert summary[0] == "efft-kernels: EFFT_BUILD_EXT=none, building nothing"
    assert summary[1] == "  cpu: not requested"
    monkeypatch.setattr(build, "_which", lambda name: None)
    targets, summary = build.plan("auto")
    assert targets == []
    assert summary[1] == "  cpu: not built: no C++ compiler: install g++ 12 or newer, or set CXX"


@pytest.mark.parametrize(
    ("present", "reason"),
    [
        ((), r"no C\+\+ compiler: install g\+\+ 12 or newer, or set CXX"),
        (("g++",), "ninja not found: pip install ninja"),
        (("g++", "ninja"), "torch's headers not found in .*: install torch 2.10 or newer into this environment first"),
    ],
)
def test_a_wish_that_cannot_be_met(present: tuple[str, ...], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_which", lambda name: f"/usr/bin/{name}" if name in present else None)
    monkeypatch.setattr(build, "_torch", lambda: Path("nowhere"))
    with pytest.raises(build.BuildError, match=f"^EFFT_BUILD_EXT=cpu: {reason}$"):
        build.plan("cpu")


def test_unknown_wish() -> None:
    with pytest.raises(ValueError, match="EFFT_BUILD_EXT must be auto, none, cpu or cuda, got 'gpu'"):
        build.requested_build({"EFFT_BUILD_EXT": "gpu"})


def test_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "3")
    assert build._jobs("cpu") == 3
    monkeypatch.delenv("MAX_JOBS")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for free, jobs in ((100 << 30, 8), (2 << 30, 2), (1 << 20, 1)):
        monkeypatch.setattr(build, "available_memory", lambda free=free: free)
        assert build._jobs("cpu") == jobs


def test_memory_of_caches_is_available() -> None:
    facts = Path("/proc/meminfo")
    if not facts.exists():
        pytest.skip("needs Linux")
    kib = {name: int(size) for name, size in re.findall(r"^(\w+): +(\d+) kB$", facts.read_text(), re.MULTILINE)}
    caches = kib["Cached"] - kib["Shmem"]
    # A half, because other programs allocate meanwhile, and Linux keeps a part for itself.
    assert (kib["MemFree"] + caches) << 9 < build.available_memory() < kib["MemTotal"] << 10


def test_a_library_of_other_sources_is_not_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    monkeypatch.setattr(build, "cache", lambda: tmp_path)
    monkeypatch.setattr(build, "sources", lambda: tmp_path / "csrc")
    before = build.library_name("cpu")
    assert re.fullmatch(CPU + r"[0-9a-f]{12}\.so", before)
    (tmp_path / before).touch()
    assert build.find("cpu") == tmp_path / before
    with (tmp_path / "csrc" / "cpu" / "product.h").open("a") as file:
        file.write("\n")
    assert build.library_name("cpu") != before
    assert build.find("cpu") is None


def test_a_library_that_does_not_load_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "libefft_cpu-0.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native, "find", lambda target: broken)
    message = native._load("cpu")
    assert message is not None
    assert re.fullmatch(
        rf"{broken} does not load: .*; build it on this machine: python -m efft_kernels build --targets cpu",
        message,
        re.DOTALL,
    )


@needs_compiler
def test_a_compiler_error_is_told_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "cpu" / "kernels.cpp").write_text("int broken() { return nothing; }\n")
    monkeypatch.setattr(build, "sources", lambda: tmp_path / "csrc")
    with pytest.raises(build.BuildError, match=r"building the cpu extension failed:\n(.|\n)*nothing"):
        build.build(["cpu"], tmp_path / "out")
    assert not list(tmp_path.rglob("*.so"))


def exported(path: Path) -> list[str]:
    done = subprocess.run(["nm", "-D", "--undefined-only", str(path)], capture_output=True, text=True, check=True)
    return [line.split()[-1].partition("@")[0] for line in done.stdout.splitlines()]


@needs_compiler
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm from binutils")
def test_nothing_but_the_stable_abi_is_used() -> None:
    """The library uses no C++ symbols of torch and no symbols of Python, so it does not depend on their versions."""
    path = build.find("cpu")
    assert path is not None
    names = exported(path)
    assert "torch_library_impl" in names
    assert not [name for name in names if re.match(r"_Z.*(3c10|2at|5torch)|_?Py[A-Z_]", name)]


@needs_compiler
@pytest.mark.slow
def test_installed_wheel(tmp_path: Path) -> None:
    """The wheel with the extension has the right tag and contents, and the program uses the library in the wheel."""
    environment = {**os.environ, "EFFT_BUILD_EXT": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"efft_kernels-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = (
        f"import json, sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import efft_kernels, torch\n"
        "from efft_kernels import build, testing\n"
        "y = efft_kernels.tt_linear(**testing.make_inputs('tt_linear'), backend='cpu')\n"
        "print(json.dumps([efft_kernels.__file__, str(build.find('cpu')), list(y.shape)]))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    package, library, shape = json.loads(done.stdout)
    assert package == str(tmp_path / "site/efft_kernels/__init__.py")
    assert Path(library).parent == tmp_path / "site/efft_kernels/lib"
    assert shape == [29, 40]


def test_an_installation_fails_if_its_wish_cannot_be_met(tmp_path: Path) -> None:
    """If the extension is requested and there is no compiler, building the wheel fails and reports the reason."""
    environment = {**os.environ, "EFFT_BUILD_EXT": "cpu", "PATH": str(tmp_path), "CXX": "no-such-compiler"}
    command = [sys.executable, "setup.py", "bdist_wheel", "--dist-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "EFFT_BUILD_EXT=cpu: no C++ compiler: install g++ 12 or newer, or set CXX" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("wish", "code"), [("auto", 0), ("cpu", 1)])
def test_a_compiler_that_fails(wish: str, code: int, tmp_path: Path) -> None:
    """A failing compiler makes an installation fail only if the user requested the extension."""
    if missing_tools("cpu"):
        pytest.skip(missing_tools("cpu") or "")
    environment = {**os.environ, "EFFT_BUILD_EXT": wish, "CXX": "/bin/false"}
    folders = ["--bdist-dir", str(tmp_path / "files"), "--dist-dir", str(tmp_path / "out")]
    command = [sys.executable, "setup.py", "build", "--build-base", str(tmp_path / "build"), "bdist_wheel", *folders]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "building the cpu extension failed" in done.stdout + done.stderr
    if wish == "auto":
        assert "efft-kernels: going on without cpu; try again: python -m efft_kernels build" in done.stdout
        (wheel,) = (tmp_path / "out").glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            assert not [name for name in archive.namelist() if name.endswith(".so")]


@pytest.mark.parametrize("words", [["--targets", "cpu"], []])
def test_the_command(words: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "EFFT_BUILD_EXT": "cpu", "PATH": str(tmp_path), "CXX": "no-such-compiler"}
    command = [sys.executable, "-m", "efft_kernels", "build", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: EFFT_BUILD_EXT=cpu: no C++ compiler: install g++ 12 or newer, or set CXX\n"
