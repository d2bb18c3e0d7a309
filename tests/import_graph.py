"""Find out from the sources which module imports which, without running them.

The graph has an edge from module A to module B of the given packages if A's source does one of the following, at the
top level, inside a function or under ``if TYPE_CHECKING`` (the types depend on B as well):

- It contains ``import B`` or ``from B import name``. If ``B.name`` is a module, the edge leads to that module. A second
  edge leads to B if B's ``__init__`` binds the name (a re-export).
- It calls ``import_module`` or ``__import__``, and contains the dotted name of B in any string, for instance in a table
  of commands, or contains an f-string that can produce the name.

An import of ``package.module`` also runs ``package/__init__.py``, but has no edge to it. The ``__init__`` starts to run
before any of the package's modules, and such edges would create a cycle in every package that re-exports names. An
``__init__`` has edges to the modules that it re-exports, like any other module.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Edge:
    """Record that ``source`` imports ``target`` on a line of its file."""

    source: str
    target: str
    line: int


def sources(folders: Mapping[str, Path]) -> dict[str, Path]:
    """Return the file of each module of the packages, by dotted name; a package's name stands for its ``__init__``."""
    found = {}
    for package, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        found.setdefault(package, folder / "__init__.py")  # a namespace package does not have this file
    return found


def edges(modules: Mapping[str, Path]) -> list[Edge]:
    """Return all imports among ``modules``, except imports of a module by itself."""
    trees = {name: ast.parse(path.read_text() if path.is_file() else "") for name, path in modules.items()}
    bound = {name: set(_bound(tree)) for name, tree in trees.items()}
    return [
        Edge(source, target, line)
        for source, tree in trees.items()
        for target, line in _targets(tree, bound)
        if target != source
    ]


def circles(found: list[Edge]) -> list[set[str]]:
    """Return the import cycles: sets of two or more modules that all reach one another."""
    direct: dict[str, set[str]] = {}
    for edge in found:
        direct.setdefault(edge.source, set()).add(edge.target)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        open_ = [start]
        while open_:
            for target in direct.get(open_.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    open_.append(target)
        return seen

    reach = {module: reached(module) for module in direct}
    result: list[set[str]] = []
    for module, behind in reach.items():
        if module in behind and not any(module in circle for circle in result):
            result.append({other for other in behind if module in reach.get(other, ())})
    return result


def _bound(tree: ast.Module) -> Iterator[str]:
    """Yield the names that the source of the module binds, including those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def _targets(tree: ast.Module, bound: Mapping[str, set[str]]) -> Iterator[tuple[str, int]]:
    """Yield (module, line) of every import in ``tree`` of one of the modules that are keys of ``bound``."""
    dynamic = any(
        isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__")
        for node in ast.walk(tree)
    )
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in bound:
                    yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative import"
            module = node.module or ""
            for alias in node.names:
                of_package = f"{module}.{alias.name}"
                if of_package in bound:
                    yield of_package, node.lineno
                if module in bound and (of_package not in bound or alias.name in bound[module]):
                    yield module, node.lineno
        elif dynamic and isinstance(node, ast.Constant) and node.value in bound:
            yield node.value, node.lineno
        elif dynamic and isinstance(node, ast.JoinedStr):
            parts = (re.escape(part.value) if isinstance(part, ast.Constant) else ".*" for part in node.values)
            pattern = "".join(parts)
            if pattern.startswith(tuple(re.escape(f"{name}.") for name in bound)):
                yield from ((name, node.lineno) for name in bound if re.fullmatch(pattern, name))
