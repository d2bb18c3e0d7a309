"""Parse command lines with tyro.

tyro shows the docstrings of functions and fields as help texts. This module removes the RST markup from them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

_RULES = ConstructorRegistry()
_resolving: list[Any] = []  # types for which _plain_fields is calling tyro's own rules


def parse(function: Callable[..., Any], words: Sequence[str], prog: str, **options: Any) -> Any:
    """Call a function or create a dataclass from command-line arguments. ``options`` are passed to ``tyro.cli``.

    Raises:
        SystemExit: the arguments ask for help or are invalid.
    """
    with _RULES:
        return tyro.cli(function, args=words, prog=prog, config=(tyro.conf.OmitArgPrefixes,), **options)


def parse_subcommand(functions: dict[str, Callable[..., Any]], words: Sequence[str], prog: str) -> Any:
    """Call the function that the first argument names, with the other arguments; see :func:`parse`."""
    with _RULES:
        return tyro.extras.subcommand_cli_from_dict(functions, args=words, prog=prog)


def without_markup(text: str) -> str:
    """Convert a docstring to text for a terminal.

    Roles and double backticks become single backticks. Each paragraph becomes one line, which the terminal wraps.
    """
    text = re.sub(r":[a-z]+:`[~!]?([^`]*)`", r"`\1`", text).replace("``", "`")
    return re.sub(r"(?<!\n)\n[ \t]*(?!\n)", " ", text)


@_RULES.struct_rule
def _plain_fields(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Return the fields of a dataclass as tyro finds them, and remove the markup from their help texts."""
    if not dataclasses.is_dataclass(info.type) or info.type in _resolving:
        return None
    _resolving.append(info.type)
    with contextlib.ExitStack() as stack:
        stack.callback(_resolving.pop)
        spec = ConstructorRegistry.get_struct_spec(info)
    if not isinstance(spec, StructConstructorSpec):
        return None
    fields = tuple(dataclasses.replace(field, helptext=_plain_help(field.helptext)) for field in spec.fields)
    return dataclasses.replace(spec, fields=fields)


def _plain_help(text: str | Callable[[], str | None] | None) -> str | Callable[[], str | None] | None:
    if callable(text):
        return lambda: _plain_help(text())  # type: ignore[return-value]
    return None if text is None else without_markup(text)
