"""Test the location of code, and the direction of imports between packages."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import efft_kernels
from tests.import_graph import Edge, circles, edges, sources

ROOT = Path(__file__).parents[1]
KERNELS, EFFT = ROOT / "efft_kernels", ROOT / "python" / "efft"
SOURCES = [
    path
    for folder in (KERNELS, ROOT / "python", ROOT / "tests", ROOT / "benchmarks", ROOT / "csrc")
    for path in sorted(folder.rglob("*"))
    if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"}
]
#: The packages in the order of their dependencies: each may import only those before it.
PACKAGES = {
    "efft_kernels": KERNELS,
    "efft": EFFT,
    "efft_lab": ROOT / "python" / "efft_lab",
    "benchmarks": ROOT / "benchmarks",
    "tests": ROOT / "tests",
}
#: The submodules of efft_kernels that are public, in addition to the names in its ``__all__``.
PUBLIC = ("efft_kernels.nn", "efft_kernels.env", "efft_kernels.testing")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def public_modules(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}


def imports(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """Yield (module, name) of every import; the name is None for ``import module``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)


def packages(tree: ast.AST) -> set[str]:
    return {module.partition(".")[0] for module, _ in imports(tree)}


#: The files of the triton folder in addition to one file per op: kernels that ops share, and their launchers.
TRITON_PARTS = {"launch", "lowrank_gemm", "producers", "reduce_tokens", "interpreter"}


@pytest.mark.parametrize("folder", ["reference", "eager", "triton"])
def test_an_op_has_one_name_in_every_layer(folder: str) -> None:
    ops = public_modules(KERNELS / "ops")
    assert ops
    if folder == "triton":
        assert public_modules(KERNELS / folder) == ops | TRITON_PARTS
        return
    tree = ast.parse((KERNELS / f"{folder}.py").read_text())
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert ops == {re.sub(r"(_fwd|_bwd|_)$", "", name) for name in defined if name.startswith("tt_")}


@pytest.mark.parametrize("folder", ["cpu", "cuda"])
def test_an_op_has_one_name_in_the_extension(folder: str) -> None:
    found = {path.stem for path in (ROOT / "csrc" / folder).glob("tt_*.cpp")}
    assert found == public_modules(KERNELS / "ops")


def test_every_op_has_its_tests_and_nothing_else_has() -> None:
    found = {path.stem for path in (ROOT / "tests" / "efft_kernels" / "ops").glob("*.py")} - {"conftest"}
    together = {
        "test_tt_gelu_linear": "test_producers",
        "test_tt_norm_linear": "test_producers",
    }  # these ops differ only in the producer, the operation whose output the layer reads
    assert found == {together.get(f"test_{op}", f"test_{op}") for op in public_modules(KERNELS / "ops")}


def test_every_op_is_public() -> None:
    for op in public_modules(KERNELS / "ops"):
        assert {op, f"{op}_"} & set(efft_kernels.__all__), op


def test_no_drawer_for_everything() -> None:
    assert not [relative(path) for path in SOURCES if path.stem in {"utils", "util", "helpers", "misc", "common"}]


@pytest.mark.parametrize("path", sorted(EFFT.rglob("*.py")), ids=relative)
def test_efft_uses_public_names_of_the_kernels_only(path: Path) -> None:
    for module, name in imports(ast.parse(path.read_text())):
        if module.partition(".")[0] != "efft_kernels":
            continue
        of_package = module == "efft_kernels" and (name is None or name in efft_kernels.__all__)
        of_submodule = f"{module}.{name}".startswith(PUBLIC) and not (name or "").startswith("_")
        assert of_package or of_submodule, (
            f"{module}.{name} is not in efft_kernels.__all__ and not in {', '.join(PUBLIC)}"
        )


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=relative)
def test_kernels_need_torch_only(path: Path) -> None:
    """Modules may also import numpy. Outside the triton backend, only functions and classes may import triton."""
    allowed = {*sys.stdlib_module_names, "efft_kernels", "torch", "numpy"}
    tree = ast.parse(path.read_text())
    assert packages(tree) <= allowed | {"triton"}
    if "triton" not in path.relative_to(KERNELS).parts:
        tree.body = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assert packages(tree) <= allowed


def test_public_names_exist() -> None:
    for name in efft_kernels.__all__:
        assert hasattr(efft_kernels, name)


# --- imports ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imported() -> list[Edge]:
    return edges(sources(PACKAGES))


def package_of(module: str) -> str:
    return module.partition(".")[0]


def upward(found: list[Edge]) -> list[Edge]:
    """Return the imports of a later package by an earlier one."""
    order = list(PACKAGES)
    return [e for e in found if order.index(package_of(e.source)) < order.index(package_of(e.target))]


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "tests"])
def test_no_circle_of_imports(package: str, imported: list[Edge]) -> None:
    found = [sorted(circle) for circle in circles(imported) if package in map(package_of, circle)]
    assert not found


def test_packages_import_in_one_direction(imported: list[Edge]) -> None:
    assert {package_of(e.source) for e in imported} == set(PACKAGES)
    assert not upward(imported)


#: Every way to import, as source text with placeholders for the package and the module.
PLANTED = {
    "import": "import {p}.{m}\n",
    "from": "from {p} import {m}\n",
    "name": "from {p}.{m} import something\n",
    "in a function": "def f():\n    import {p}.{m}\n",
    "for types": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import {p}.{m}\n",
    "import_module": "import importlib\nimportlib.import_module('{p}.{m}')\n",
    "import_module by a table": "from importlib import import_module\nT = ['{p}.{m}']\nimport_module(T[0])\n",
    "import_module by a pattern": "import importlib\nn = '{m}'\nimportlib.import_module(f'{p}.{{n}}')\n",
    "__import__": "__import__('{p}.{m}')\n",
}


def planted(folder: Path, kind: str, target: str, into: str) -> list[Edge]:
    """Write two packages and return their imports.

    The packages are ``efft_kernels`` with the modules a and b, of which b imports a, and ``efft`` with the module c.
    The module ``into`` also imports ``target``, in the way that ``kind`` names.
    """
    text = {"efft_kernels.__init__": "", "efft_kernels.a": "", "efft_kernels.b": "import efft_kernels.a\n"}
    text |= {"efft.__init__": "", "efft.c": ""}
    package, _, module = target.partition(".")
    text[into] += PLANTED[kind].format(p=package, m=module)
    for name, source in text.items():
        package, _, module = name.partition(".")
        (folder / package).mkdir(exist_ok=True)
        (folder / package / f"{module}.py").write_text(source)
    return edges(sources({name: folder / name for name in ("efft_kernels", "efft")}))


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_circle_is_found(kind: str, tmp_path: Path) -> None:
    assert circles(planted(tmp_path, "import", "efft_kernels.a", "efft.c")) == []
    found = circles(planted(tmp_path, kind, "efft_kernels.b", "efft_kernels.a"))
    assert found == [{"efft_kernels.a", "efft_kernels.b"}]


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_arrow_upward_is_found(kind: str, tmp_path: Path) -> None:
    assert not upward(planted(tmp_path, kind, "efft_kernels.b", "efft.c"))
    (found,) = upward(planted(tmp_path, kind, "efft.c", "efft_kernels.a"))
    assert (found.source, found.target) == ("efft_kernels.a", "efft.c")


def test_a_circle_through_a_package_that_exports_is_found(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text("from efft.one import f\n")
    (tmp_path / "one.py").write_text("def f(): ...\n")
    (tmp_path / "two.py").write_text("from efft import one\n")
    assert circles(edges(sources({"efft": tmp_path}))) == []
    (tmp_path / "one.py").write_text("from efft import f as again\n\ndef f(): ...\n")
    assert circles(edges(sources({"efft": tmp_path}))) == [{"efft", "efft.one"}]
