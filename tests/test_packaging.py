"""Test the packages that users install: build them once from a copy of the tree, without network, and inspect them."""

from __future__ import annotations

import configparser
import email.parser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest

import efft_kernels

build = pytest.importorskip("build", reason="needs the `build` package of the dev extra")

ROOT = Path(__file__).parents[1]
PACKAGES = {"efft_kernels": "efft_kernels", "efft": "python/efft", "efft_lab": "python/efft_lab"}
FOLDERS = ("efft_kernels", "python", "csrc", "tests", "benchmarks", "docs", ".ci")
GENERATED = shutil.ignore_patterns("__pycache__", "*.egg-info")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the sdist and the wheel built from it; files missing in MANIFEST.in are missing in both."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("built")
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, tree)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=GENERATED)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "EFFT_BUILD_EXT": "none"})
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.parser.Parser().parsestr(wheel.read(name).decode())


def python_files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*.py")}


def test_build_does_not_fetch_torch() -> None:
    assert build.ProjectBuilder(ROOT).build_system_requires == {"setuptools>=77", "ninja>=1.11"}


@pytest.mark.slow
def test_wheel_without_the_extension_is_pure_python(built: Path) -> None:
    (path,) = built.glob("*.whl")
    assert path.name == f"efft_kernels-{efft_kernels.__version__}-py3-none-any.whl"


@pytest.mark.slow
def test_wheel_holds_both_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = {
        f"{package}/{name}"
        for package, folder in (
            ("efft_kernels", "efft_kernels"),
            ("efft", "python/efft"),
            ("efft_lab", "python/efft_lab"),
        )
        for name in python_files(ROOT / folder)
    }
    data = {path.relative_to(ROOT / "python").as_posix() for path in (ROOT / "python").rglob("*.json")}
    assert {name.rpartition("/")[0] for name in data} == {
        "efft_lab/data",
        "efft_lab/compare",
        "efft_lab/compare/suites",
    }
    native = {f"efft_kernels/csrc/{path.relative_to(ROOT / 'csrc')}" for path in (ROOT / "csrc").rglob("*.*")}
    assert native, "no sources in csrc"
    assert names == sources | data | native | {"efft_kernels/py.typed", "efft_kernels/measured.json", "efft/py.typed"}


@pytest.mark.slow
def test_wheel_metadata(metadata: Message) -> None:
    assert metadata["Name"] == "efft-kernels"
    assert metadata["Version"] == efft_kernels.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata.get_all("Provides-Extra") == ["vision", "train", "compare", "render", "hf", "triton", "docs", "dev"]


@pytest.mark.slow
def test_every_extra_that_is_named_exists(metadata: Message) -> None:
    """The package metadata declares all extras that error messages and the documentation name."""
    texts = [*(ROOT / "efft_kernels").rglob("*.py"), *(ROOT / "python").rglob("*.py"), *ROOT.glob("*.md")]
    named = {name for path in texts for name in re.findall(r"""["'`](?:efft-kernels|\.)\[(\w+)\]""", path.read_text())}
    assert "train" in named
    assert named <= set(metadata.get_all("Provides-Extra", []))


@pytest.mark.slow
def test_run_time_dependencies_have_floors_and_no_ceilings(metadata: Message) -> None:
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {re.match(r"[\w-]+", line)[0] for line in required} == {"torch", "safetensors", "numpy"}
    assert all(re.fullmatch(r"[\w-]+>=[\d.]+", line) for line in required), required


@pytest.mark.slow
def test_wheel_declares_the_command(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    entry_points = configparser.ConfigParser()
    entry_points.read_string(wheel.read(name).decode())
    assert dict(entry_points["console_scripts"]) == {"efft": "efft_lab.cli:main"}


@pytest.mark.slow
def test_wheel_imports_outside_the_repository(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import efft, efft_lab.cli, efft_kernels\n"
        "assert callable(efft_lab.cli.main)\n"
        "print(efft.__file__, efft_kernels.__file__, efft_kernels.__version__, sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(tmp_path / "efft/__init__.py"),
        str(tmp_path / "efft_kernels/__init__.py"),
        efft_kernels.__version__,
    ]


@pytest.mark.slow
def test_sdist_is_a_complete_working_tree(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    expected = {".ci/run", "LICENSE", "Makefile", "README.md", "csrc/README.md", "docs/efft.svg"}
    assert expected <= names
    assert {f"tests/{name}" for name in python_files(ROOT / "tests")} <= names


def test_every_environment_variable_is_documented() -> None:
    """The variables that the code reads (quoted EFFT_ names) must be those in the first column of ENVIRONMENT.md."""
    sources = [ROOT / "setup.py", *(ROOT / "efft_kernels").rglob("*.py"), *(ROOT / "python").rglob("*.py")]
    sources += [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    read = {name for path in sources for name in re.findall(r"""["'](EFFT_[A-Z0-9_]+)["']""", path.read_text())}
    table = (ROOT / "ENVIRONMENT.md").read_text()
    assert read == set(re.findall(r"^\| `(EFFT_[A-Z0-9_]+)` ", table, re.MULTILINE))


def test_the_oldest_triton_that_is_checked_is_the_oldest_allowed() -> None:
    checked = re.search(r"^OLDEST_TRITON := ([\d.]+)\.0$", (ROOT / "Makefile").read_text(), re.M)
    assert checked is not None
    assert f'"triton>={checked[1]}; ' in (ROOT / "pyproject.toml").read_text()
