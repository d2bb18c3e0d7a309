"""Command lines by tyro, whose help shows docstrings: here without the markup that they have for the documentation."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

_RULES = ConstructorRegistry()
_resolving: list[Any] = []  # types whose fields tyro's own rules are describing just now


def parse(function: Callable[..., Any], words: Sequence[str], prog: str, **options: Any) -> Any:
    """Calls a function, or makes a dataclass, from the words of a command line. ``options`` are those of ``tyro.cli``.

    Raises:
        SystemExit: the words ask for help or are not understood.
    """
    with _RULES:
        return tyro.cli(function, args=words, prog=prog, config=(tyro.conf.OmitArgPrefixes,), **options)


def parse_subcommand(functions: dict[str, Callable[..., Any]], words: Sequence[str], prog: str) -> Any:
    """Calls the function that the first word names, see :func:`parse`."""
    with _RULES:
        return tyro.extras.subcommand_cli_from_dict(functions, args=words, prog=prog)


def without_markup(text: str) -> str:
    """A docstring as a terminal shows it: roles and double backticks become single backticks, and each paragraph is one
    line, which the terminal wraps."""
    text = re.sub(r":[a-z]+:`[~!]?([^`]*)`", r"`\1`", text).replace("``", "`")
    return re.sub(r"(?<!\n)\n[ \t]*(?!\n)", " ", text)


@_RULES.struct_rule
def _plain_fields(info: StructTypeInfo) -> StructConstructorSpec | None:
    """The fields of a dataclass as tyro finds them, with help texts without markup."""
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
