"""``EfftConfig``: everything that decides which layers EFFT adapts and how; it is what an adapter file stores."""

from __future__ import annotations

import dataclasses
import difflib
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from efft_kernels.nn.initialization import CORE_LAYOUTS

#: Version of the JSON form; raised when a reader of the old form would misread the new one.
FORMAT_VERSION = 1


@dataclass
class EfftConfig:
    """How to adapt a model. Factors come in groups (for a ViT ``mhsa`` and ``ffn``, or ``joint`` under efft1; for
    Swin one of each per stage, ``stage1_mhsa`` ...; layers given by name outside the tables ``linear_<in>x<out>``).
    Where a field may be a dict, its keys are group names or, for every stage at once, ``mhsa``, ``ffn``, ``joint``
    and ``linear``.
    """

    variant: Literal["efft1", "efft2"] = "efft2"
    """efft2: one train for attention and one for the MLP. efft1: one train for both, [Wq|Wk|Wv|Wo] taken as one d x
    4d matrix."""

    rank: int | tuple[int, int] | dict[str, int | tuple[int, int]] = 32
    """TT rank r, or (r1, r2) for rectangular cores, or either per group."""

    scale: float | dict[str, float] = 1.0
    """s, a plain multiplier of the update (not divided by the rank)."""

    trainable_scale: bool = False
    """Train s, starting from ``scale``."""

    init: str = "v"
    """The side that starts at zero: "v" or "u"; for efft2 also two letters, attention and MLP ("vu")."""

    core_init: Literal["last", "first", "matrix"] = "last"
    """Layout that the Xavier bound of the cores is taken from: that of the paper's ViT code (last), of its Swin code
    (first), or each core a matrix of its own."""

    dropout: float = 0.1
    """Probability of zeroing an element of a factor in training (activations are never dropped)."""

    targets: str | list[str] = "all"
    """"all", "mhsa" or "ffn" of a known architecture, or layers: names or their endings (after a dot), as they are or
    as regular expressions."""

    exclude: list[str] = dataclasses.field(default_factory=list)
    """Layers to leave alone, named in the same ways."""

    core_sharing: Literal["per_layer", "shared"] = "per_layer"
    """per_layer: a core per matrix of every block, as the paper counts. shared: the same cores in all blocks, as its
    code does."""

    head: list[str] | None = None
    """Modules trained and saved beside the factors; None finds the classifier, [] trains none."""

    def __post_init__(self) -> None:
        self.rank = _pairs(self.rank)
        for name, allowed in (
            ("variant", ("efft1", "efft2")),
            ("core_init", CORE_LAYOUTS),
            ("core_sharing", ("per_layer", "shared")),
        ):
            _check(getattr(self, name) in allowed, name, f"one of {allowed}", getattr(self, name))
        letters = (1, 2) if self.variant == "efft2" else (1,)
        _check(
            isinstance(self.init, str) and len(self.init) in letters and set(self.init) <= {"u", "v"},
            "init",
            "'u' or 'v'" + (", or two of them (attention and MLP)" if self.variant == "efft2" else ""),
            self.init,
        )
        for rank in _values(self.rank):
            pair = rank if isinstance(rank, tuple) else (rank, rank)
            ok = len(pair) == 2 and all(type(r) is int and r >= 1 for r in pair)
            _check(ok, "rank", "an integer >= 1, a pair of them, or a dict of these", self.rank)
        for scale in _values(self.scale):
            _check(_is_number(scale), "scale", "a number or a dict of numbers", self.scale)
        _check(_is_number(self.dropout) and 0 <= self.dropout < 1, "dropout", "in [0, 1)", self.dropout)
        _check(isinstance(self.trainable_scale, bool), "trainable_scale", "True or False", self.trainable_scale)
        _check(_is_names(self.exclude), "exclude", "a list of layer names or patterns", self.exclude)
        _check(self.head is None or _is_names(self.head), "head", "None or a list of module names", self.head)
        known = isinstance(self.targets, str) and self.targets in ("all", "mhsa", "ffn")
        _check(
            known or _is_names(self.targets),
            "targets",
            "'all', 'mhsa', 'ffn' or a list of layer names or patterns",
            self.targets,
        )

    def rank_of(self, group: str, kind: str) -> tuple[int, int]:
        """(r1, r2) of a group."""
        rank: int | tuple[int, int] = _of_group(self.rank, "rank", group, kind)
        return (rank, rank) if isinstance(rank, int) else rank

    def scale_of(self, group: str, kind: str) -> float:
        """s of a group."""
        return float(_of_group(self.scale, "scale", group, kind))

    def init_of(self, kind: str) -> str:
        """'u' or 'v' for a kind of group."""
        return self.init[-1] if kind == "ffn" else self.init[0]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict, with the format version."""
        return {"format_version": FORMAT_VERSION, "method": "efft", **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EfftConfig:
        """The config a :meth:`to_dict` came from. Keys this version does not know are reported by a warning and
        ignored.

        Raises:
            ValueError: a value out of range, or another method's config.
        """
        values = dict(values)
        version, method = values.pop("format_version", FORMAT_VERSION), values.pop("method", "efft")
        _check(type(version) is int, "format_version", "an integer", version)
        if method != "efft":
            raise ValueError(f"expected an EFFT config (method 'efft'), got method {method!r}")
        names = [f.name for f in dataclasses.fields(cls)]
        unknown = [k for k in values if k not in names]
        if unknown or version > FORMAT_VERSION:
            hints = {k: difflib.get_close_matches(k, names, 1) for k in unknown}
            listed = ", ".join(f"{k!r}" + (f" (near {h[0]!r})" if h else "") for k, h in hints.items())
            warnings.warn(
                f"EFFT config of format version {version} (this library reads {FORMAT_VERSION}): "
                f"ignored unknown keys: {listed or 'none'}",
                stacklevel=2,
            )
        return cls(**{k: v for k, v in values.items() if k in names})


def _check(ok: bool, name: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"EfftConfig.{name} must be {expected}, got {got!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _values(value: object) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else [value]


def _pairs(rank: Any) -> Any:
    """JSON has no tuples: turn lists into pairs."""
    if isinstance(rank, dict):
        return {k: _pairs(v) for k, v in rank.items()}
    return tuple(rank) if isinstance(rank, list) else rank


def _of_group(value: Any, field: str, group: str, kind: str) -> Any:
    if not isinstance(value, dict):
        return value
    for key in (group, kind):
        if key in value:
            return value[key]
    raise ValueError(
        f"EfftConfig.{field} names the groups {sorted(value)} but not {group!r}: add it, or {kind!r} for all stages"
    )
