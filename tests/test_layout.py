"""Where code lives, and which way it may depend."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import efft_kernels

ROOT = Path(__file__).parents[1]
KERNELS, EFFT = ROOT / "efft_kernels", ROOT / "python" / "efft"
SOURCES = [
    path
    for folder in (KERNELS, ROOT / "python", ROOT / "tests", ROOT / "benchmarks", ROOT / "csrc")
    for path in sorted(folder.rglob("*"))
    if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"}
]
#: Submodules of efft_kernels that are public as a whole, beside the names in its __all__.
PUBLIC = ("efft_kernels.nn", "efft_kernels.env", "efft_kernels.testing")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def public_modules(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}


def imports(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """(module, name) of every import: name is None for ``import module``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)


def packages(tree: ast.AST) -> set[str]:
    return {module.partition(".")[0] for module, _ in imports(tree)}


#: What the triton folder holds beside a file an op: kernels that ops share, and tools.
TRITON_PARTS = {"launch", "lowrank_gemm", "lowrank_gemm_tma", "producers", "reduce_tokens", "interpreter", "resources"}


@pytest.mark.parametrize("folder", ["reference", "eager", "triton"])
def test_an_op_has_one_name_in_every_layer(folder: str) -> None:
    ops = public_modules(KERNELS / "ops")
    assert ops
    assert public_modules(KERNELS / folder) == ops | (TRITON_PARTS if folder == "triton" else set())


@pytest.mark.parametrize("folder", ["cpu", "cuda"])
def test_an_op_has_one_name_in_the_extension(folder: str) -> None:
    found = {path.stem for path in (ROOT / "csrc" / folder).glob("tt_*.cpp")}
    assert found == public_modules(KERNELS / "ops")


def test_every_op_has_its_tests_and_nothing_else_has() -> None:
    found = {path.stem for path in (ROOT / "tests" / "efft_kernels" / "ops").glob("*.py")} - {"conftest"}
    together = {
        "test_tt_gelu_linear": "test_producers",
        "test_tt_norm_linear": "test_producers",
    }  # alike in all but that
    assert found == {together.get(f"test_{op}", f"test_{op}") for op in public_modules(KERNELS / "ops")}


def test_every_op_is_public() -> None:
    for op in public_modules(KERNELS / "ops"):
        assert {op, f"{op}_"} & set(efft_kernels.__all__), op


def test_no_drawer_for_everything() -> None:
    assert not [relative(path) for path in SOURCES if path.stem in {"utils", "util", "helpers", "misc", "common"}]


def test_no_file_is_too_long() -> None:
    lengths = {relative(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert not {path: length for path, length in lengths.items() if length > 400}


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
    """numpy is a dependency too; triton may be missing, so only functions and the triton backend's files import it."""
    allowed = {*sys.stdlib_module_names, "efft_kernels", "torch", "numpy"}
    tree = ast.parse(path.read_text())
    assert packages(tree) <= allowed | {"triton"}
    if "triton" not in path.relative_to(KERNELS).parts:
        tree.body = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assert packages(tree) <= allowed


def test_public_names_exist() -> None:
    for name in efft_kernels.__all__:
        assert hasattr(efft_kernels, name)
